"""Imports point downwards: a module imports from its own package or from packages below it, never in a cycle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dimaskdino"

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


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() or {node.module}
    return found


GRAPH = {name: imports(path) for name, path in FILES.items() if name != "dimaskdino"}


def part_of(module: str) -> str:
    """The top-level part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_layer():
    assert {part_of(module) for module in GRAPH} == set(LEVEL)


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_downwards(module):
    level = LEVEL[part_of(module)]
    for other in GRAPH[module]:
        if other == "dimaskdino":  # the public interface may be used by what stands above it
            assert level > LEVEL["model"]
        elif other.startswith("dimaskdino."):
            assert part_of(other) == part_of(module) or LEVEL[part_of(other)] < level, other
        assert other.split(".")[0] != "tools"


def test_no_cycle_within_a_part():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in GRAPH.get(module, ()):
                if other != module:
                    visit(other, (*way, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_the_operator_knows_nothing_of_the_kit():
    for path in (ROOT / "ops" / "ms_deform_attn").rglob("*.py"):
        assert not any(name.split(".")[0] == "dimaskdino" for name in imports(path)), path


def test_two_modules_import_hotcoco_and_only_when_they_need_it():
    modules = {module for module, names in GRAPH.items() if "hotcoco" in names}
    assert modules == {"dimaskdino.evaluation.coco_ap", "dimaskdino.data.exports.xml"}
    for module in modules:
        top = [
            node for node in ast.parse(FILES[module].read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not [node for node in top if "hotcoco" in ast.unparse(node)]
