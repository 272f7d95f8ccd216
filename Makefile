# make demo   set up, train DI-MaskDINO on the built-in data, evaluate every decoder layer, say where the results are
# make test   set up, run the tests           make test-all   the slow ones too
# make lab    set up, open the notebooks      make lint       what continuous integration checks besides the tests
# make site   execute the course and make pages and slides of it, in build/site/html
# make benchmark   time the operator; on a machine with a GPU: make gpu-check   build, test and time its GPU
#             kernels, and the R50 models
# PYTHON=python3.12 make demo   with another Python (3.11 or newer)

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
CONFIG := configs/shapes/dimaskdino_r18.yaml

.PHONY: setup demo test test-all lint lab site benchmark gpu-check
setup: .venv/.installed

.venv/.installed: pyproject.toml ops/pyproject.toml ops/ms_deform_attn/csrc/cpu.cpp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing PyTorch and the other packages: about 5 GB, some minutes."
	$(BIN)/python -m pip install -qq -e ./ops -e '.[notebooks,timm,dev]'
	@$(BIN)/python -m ms_deform_attn build || echo "Going on with the PyTorch version of the operator."
	@touch $@

demo: setup
	$(BIN)/dimaskdino run notebooks/runs/train.ipynb $(RUN) config=$(CONFIG)
	$(BIN)/dimaskdino run notebooks/runs/evaluate.ipynb $(RUN)/evaluation model=$(RUN)
	$(BIN)/dimaskdino status $(RUN)

test: setup
	$(BIN)/python -m pytest -m 'not slow'

test-all: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: setup
	$(BIN)/jupyter lab notebooks

site: setup
	$(BIN)/python -m pip install -qq -e '.[site]'
	$(BIN)/python -m dimaskdino.course.site

benchmark: setup
	$(BIN)/python -m ms_deform_attn.benchmark --output ops/benchmarks/results
	$(BIN)/python ops/benchmarks/table.py

gpu-check: setup
	$(BIN)/python -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "no GPU that torch can use")'
	$(BIN)/python -m ms_deform_attn build
	$(BIN)/python -m pytest ops/tests
	$(MAKE) benchmark
	$(BIN)/python -m dimaskdino.benchmarks.gpu_check docs/measurements/gpu_speed.jsonl
	if command -v compute-sanitizer; then compute-sanitizer --error-exitcode 1 --target-processes all \
		$(BIN)/python -m pytest -q ops/tests -k 'odd_sizes or nowhere or borders'; fi
