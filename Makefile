# make demo   set up, show the effect of De-Imbalance and BATO in a figure (`dimaskdino demo`)
# make test   set up, run the tests           make test-all   the slow ones too
# make lab    set up, open the notebooks      make lint       what continuous integration checks besides the tests
# make figures   draw the figures of README and docs from their records     make notebooks   build the chapters
# make site   build the documentation site with the course, in build/site/html
# make benchmark   time everything on an idle machine, in about an hour; STEPS="detectors coco_ap" for some of it
# make gpu-check   on a machine with a GPU: build, test and time the GPU kernels and the R50 models, results in build/gpu
#             (docs/performance.md); make gpu-wheels   download what it needs on a machine without a package index
# PYTHON=python3.12 make demo   with another Python (3.11 or newer)
# TORCH_INDEX=URL make demo     PyTorch from this package index instead of the one chosen below

PYTHON ?= python3
BIN := .venv/bin
GPU_OUT := build/gpu
GPU_PYTHON := 3.12
GPU_PACKAGES := pydantic pydantic-core annotated-types typing-inspection tyro docstring-parser typeguard \
	pycocotools 'hotcoco<2' beartype
# Without an NVIDIA driver on Linux: PyTorch's index of CPU builds, if it can be reached
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-all lint lab site notebooks figures benchmark gpu-check gpu-wheels

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

.venv/.torch: .venv/.created
	@index="$(TORCH_INDEX)"; \
	if [ -z "$$index" ] && [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null \
		&& $(BIN)/python -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=10)' 2>/dev/null; \
	then index=$(CPU_INDEX); fi; \
	if [ -n "$$index" ]; then echo "Installing PyTorch from $$index."; set -- --index-url "$$index"; \
	else echo "Installing PyTorch from the default package index: with CUDA about 5 GB on disk, some minutes."; set --; fi; \
	$(BIN)/python -m pip install -qq "torch>=2.10" torchvision "$$@"
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml ops/ms_deform_attn/csrc/cpu.cpp
	@echo "Installing the kit and what its notebooks need."
	$(BIN)/python -m pip install -qq -e '.[notebooks]'
	@$(BIN)/python -m ms_deform_attn build 2>/dev/null || echo "No C++ compiler: using the PyTorch version of the operator."
	@touch $@

.venv/.dev: .venv/.installed
	$(BIN)/python -m pip install -qq -e '.[notebooks,photos,hub,site,dev]'
	@touch $@

demo: .venv/.installed
	$(BIN)/dimaskdino demo

test: .venv/.dev
	$(BIN)/python -m pytest -m 'not slow' -n auto --maxprocesses 8 --dist worksteal

test-all: .venv/.dev
	$(BIN)/python -m pytest

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: .venv/.installed
	$(BIN)/jupyter lab notebooks

notebooks: .venv/.dev
	$(BIN)/python -m tools.course.build

figures: .venv/.installed
	$(BIN)/python -m tools.records.figures

site: .venv/.dev
	$(BIN)/python -m tools.course.site

benchmark: .venv/.installed
	$(BIN)/python -m tools.benchmarks $(STEPS)

# WHEELS=build/wheels: on a machine without a package index, add these packages to a Python that has torch
gpu-wheels: .venv/.dev
	@mkdir -p build && $(BIN)/python -m pip freeze --exclude-editable > build/versions.txt
	$(BIN)/python -m pip download -q -c build/versions.txt --no-deps --only-binary=:all: --implementation cp \
		--python-version $(GPU_PYTHON) --platform manylinux2014_x86_64 $(foreach n,17 24 27 28 34,--platform manylinux_2_$(n)_x86_64) -d build/wheels \
		$(GPU_PACKAGES)

gpu-check:
	@if [ -n "$(WHEELS)" ]; then \
		$(PYTHON) -m pip install -q --no-index --no-deps --upgrade --target build/gpu-site $(WHEELS)/*.whl \
		&& PYTHONPATH=build/gpu-site:ops:. $(PYTHON) -m tools.benchmarks.gpu_check $(GPU_OUT) $(GPU_ARGUMENTS); \
	else $(MAKE) .venv/.dev && $(BIN)/python -m tools.benchmarks.gpu_check $(GPU_OUT) $(GPU_ARGUMENTS); fi
