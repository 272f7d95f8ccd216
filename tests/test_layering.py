"""Imports point downwards: a module imports from its own package or from packages below it, never in a cycle."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dimaskdino"
OPS = PACKAGE.parent / "ops" / "ms_deform_attn"

# from the bottom to the top; packages on one line do not know each other
LAYERS = (
    ("utils",),
    ("config",),
    ("modeling",),
    ("checkpoints", "data"),
    ("runs",),
    ("evaluation",),
    ("training",),
    ("inspection",),
    ("studies",),
    ("viz",),
    ("interop",),
    ("model",),
    ("course",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The top-level part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Every module of the kit that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {module_name(p) for p in MODULES}
            found |= names & modules or {node.module}
    return {name for name in found if name.split(".")[0] == "dimaskdino"}


def test_every_part_has_a_layer():
    assert {part_of(module_name(path)) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_downwards(path):
    here = part_of(module_name(path))
    upwards = {
        name for name in imports(path) if part_of(name) != here and LEVEL.get(part_of(name), len(LAYERS)) >= LEVEL[here]
    }
    # the public interface may be used by what stands above it
    if LEVEL[here] > LEVEL["model"]:
        upwards.discard("dimaskdino")
    assert not upwards


def test_no_cycle_within_a_part():
    graph = {module_name(path): imports(path) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in graph.get(module, ()):
                if other != module:
                    visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_operator_knows_nothing_of_the_kit():
    assert all(not imports(path) for path in OPS.rglob("*.py"))


def test_the_package_does_not_import_the_tools():
    for path in MODULES:
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name and name.split(".")[0] == "tools"}, path
