"""The wheel is complete, and the conda environment asks for the same packages as pyproject.toml."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
CONDA_ONLY = {"python", "pip", "cxx-compiler"}
CONDA_NAMES = {"torch": "pytorch"}
NOT_IN_CONDA = {"transformers"}  # benchmarks alone


def requirement(text: str) -> tuple[str, str]:
    """Name and version bound, without spaces and in lower case."""
    match = re.match(r"([A-Za-z0-9_.-]+)\s*(.*)", text)
    return match[1].lower(), match[2].replace(" ", "")


def project(file: str = "pyproject.toml") -> dict:
    return tomllib.loads((ROOT / file).read_text())


def pip_requirements() -> dict[str, str]:
    wanted = {}
    for file in ("pyproject.toml", "ops/pyproject.toml"):
        table = project(file)["project"]
        for group in (table["dependencies"], *table.get("optional-dependencies", {}).values()):
            wanted |= dict(map(requirement, group))
    return {CONDA_NAMES.get(name, name): bound for name, bound in wanted.items() if name not in NOT_IN_CONDA}


def conda_requirements() -> dict[str, str]:
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    nested = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    assert [line for line in nested if line.startswith("-e")] == ["-e ."]
    plain = [entry for entry in entries if isinstance(entry, str)]
    plain += [line for line in nested if not line.startswith("-e")]
    return dict(map(requirement, plain))


def test_conda_asks_for_the_same_packages_and_bounds():
    found = conda_requirements()
    assert {name: bound for name, bound in found.items() if name not in CONDA_ONLY} == pip_requirements()
    assert found["python"] == project()["project"]["requires-python"].replace(" ", "")


def test_every_dependency_has_a_tested_version():
    table = project()["project"]
    wanted = {requirement(text)[0] for text in (*table["dependencies"], *table["optional-dependencies"]["notebooks"])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    fixed = dict(line.split("==") for line in lines)
    assert {name.replace("_", "-") for name in wanted} <= fixed.keys()
    assert not [line for line in lines if "://" in line or " @ " in line]


def test_every_package_is_listed():
    folders = {path.parent for path in (ROOT / "dimaskdino").rglob("*.py")}
    listed = {name for name in project()["tool"]["setuptools"]["packages"] if not name.startswith("dimaskdino._data")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"ms_deform_attn"} == listed


SCRIPT = """
import sys
from pathlib import Path

import dimaskdino
import ms_deform_attn

model = dimaskdino.load("dimaskdino-shapes")
result = model.predict("photo.jpg", threshold=0)
assert result.boxes.shape == (len(result), 4) and result.masks.shape == (len(result), 96, 128)
assert len(result) == len(result.scores) == len(result.class_names) == 100
result.save("out.png")
assert result.to_coco()[0]["segmentation"]["size"] == [96, 128]
seen = model.inspect("photo.jpg")
assert seen.trace.T_s2.indices.shape == (1, 40)
assert dimaskdino.load("dimaskdino-solids").classes == ["ball", "block", "can", "cone", "hoop"]
assert dimaskdino.load_config("shapes/dimaskdino_r18").model.classes == 5
assert dimaskdino.__version__ == sys.argv[2]
here = Path(sys.argv[1]).resolve()
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ("dimaskdino", "ms_deform_attn") and getattr(module, "__file__", None):
        assert here in Path(module.__file__).resolve().parents, module.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, because building writes beside the sources
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_the_operators_sources_and_the_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"ms_deform_attn/csrc/cpu.cpp", "ms_deform_attn/csrc/cuda.cu", "ms_deform_attn/functional.py"} <= names
    configs = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"dimaskdino/_data/configs/{name}" for name in configs} <= names
    assert {"dimaskdino/py.typed", "dimaskdino/studies/paper_tables.json"} <= names
    assert not any(name.startswith(("tools/", "tests/", "docs/")) for name in names)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = ["install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install], check=True)
    return folder


def outside(folder: Path) -> dict[str, str]:
    """The environment variables of a process that finds the dependencies of the tests, but no editable installs."""
    return {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": "/usr/bin:/bin", "HOME": str(folder)}


CHAPTERS = sorted((ROOT / "notebooks" / "solutions").glob("0*.ipynb"))
FAST = "04_de_imbalance"


@pytest.mark.parametrize(
    "chapter", [pytest.param(p, id=p.stem, marks=() if p.stem == FAST else pytest.mark.slow) for p in CHAPTERS]
)
def test_a_copied_chapter_runs_in_an_empty_folder(chapter, environment, tmp_path):
    (tmp_path / "work").mkdir()
    copy = tmp_path / "work" / chapter.name
    copy.write_bytes(chapter.read_bytes())
    execute = ["-c", "from nbclient.cli import main; main()", "--timeout=3600", "--output=done.ipynb", copy.name]
    command = [environment / "bin" / "python", *execute]
    done = subprocess.run(command, cwd=copy.parent, env=outside(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_empty_environment_with_the_wheel_alone_predicts(wheel, environment, tmp_path):
    python = environment / "bin" / "python"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(
        tmp_path / "photo.jpg"
    )
    # the dependencies come from the environment of the tests; PYTHONPATH leaves out its editable installs
    version = wheel.name.split("-")[1]
    subprocess.run(
        [python, "-W", "ignore", "-c", SCRIPT, environment, version],
        cwd=tmp_path,
        check=True,
        env=outside(tmp_path),
    )
    assert (tmp_path / "out.png").stat().st_size > 5000
    status = subprocess.run(
        [environment / "bin" / "dimaskdino", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
        env=outside(tmp_path),
    )
    assert "shapes/dimaskdino_r18" in status.stdout.splitlines()
