"""environment.yml and pyproject.toml ask for the same packages."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONDA_ONLY = {"python", "pip", "detectron2", "cxx-compiler"}
CONDA_NAMES = {"torch": "pytorch"}


def requirement(text: str) -> tuple[str, str]:
    """Name and version bound, with spaces and case out of the way."""
    match = re.match(r"([A-Za-z0-9_.-]+)\s*(.*)", text)
    return match[1].lower(), match[2].replace(" ", "")


def pip_requirements() -> dict[str, str]:
    wanted = {}
    for file in ("pyproject.toml", "ops/pyproject.toml"):
        project = tomllib.loads((ROOT / file).read_text())["project"]
        for group in (project["dependencies"], *project.get("optional-dependencies", {}).values()):
            wanted |= dict(map(requirement, group))
    return {CONDA_NAMES.get(name, name): bound for name, bound in wanted.items()}


def conda_requirements() -> dict[str, str]:
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    nested = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    assert [line for line in nested if line.startswith("-e")] == ["-e ./ops", "-e ."]
    plain = [entry for entry in entries if isinstance(entry, str)]
    plain += [line for line in nested if not line.startswith("-e")]
    return dict(map(requirement, plain))


def test_same_packages_and_bounds():
    wanted = pip_requirements()
    assert wanted.pop("ms-deform-attn") == ""  # installed from ./ops
    got = conda_requirements()
    assert {name: bound for name, bound in got.items() if name not in CONDA_ONLY} == wanted


def test_python_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert conda_requirements()["python"] == project["requires-python"].replace(" ", "")
