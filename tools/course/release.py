"""The course as assignments for nbgrader: `python -m tools.course.release FOLDER`.

Each chapter becomes an assignment, `FOLDER/source/NN_name/NN_name.ipynb`, with the solutions between nbgrader's marks.
A graded cell follows each exercise: its hidden test runs the check of the exercise again, from the installed package,
with inputs that the notebook does not show.

    cd FOLDER
    nbgrader generate_assignment 01_imbalance      # the students' version, in release/
    nbgrader autograde 01_imbalance                # grades submitted/STUDENT/01_imbalance/

The folder must lie inside a clone of the kit, where the notebooks find the models.
"""

import ast
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dimaskdino.runs.processes import project_root
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import write_text
from tools.course.build import BEGIN, END, read_source

_CONFIG = """c = get_config()
c.CourseDirectory.course_id = "dimaskdino"
c.ClearSolutions.code_stub = {"python": "...  # your code here"}
c.ExecutePreprocessor.timeout = 600
"""


_HIDDEN = """# Exercise {number}, graded
### BEGIN HIDDEN TESTS
import importlib, sys
for name in [n for n in sys.modules if n.startswith('dimaskdino.course.checks')]:
    del sys.modules[name]  # whatever became of it, the one below is as installed
checks = importlib.import_module('dimaskdino.course.checks')
with checks.other_cases({seed}):
    assert {check}
### END HIDDEN TESTS"""


def graded(source: Path, seed: int) -> NotebookNode:
    """A chapter for nbgrader; `seed` chooses the inputs of the hidden tests.

    Raises:
        UserError: an exercise has no check.
    """
    notebook = read_source(source)
    cells, exercise = [], 0
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cells.append(cell)
        if cell.cell_type != "code" or BEGIN not in map(str.strip, cell.source.splitlines()):
            continue
        exercise += 1
        check = check_in(cell.source)
        if check is None:
            raise UserError(f"{source}: an exercise without a call of checks.check_…:\n{cell.source}")
        cell.source = cell.source.replace(BEGIN, "### BEGIN SOLUTION").replace(END, "### END SOLUTION")
        cell.metadata["nbgrader"] = _marks(f"exercise-{exercise}", solution=True)
        hidden = nbformat.v4.new_code_cell(_HIDDEN.format(number=exercise, seed=seed + exercise, check=check))
        hidden["id"] = f"graded-{exercise}"
        hidden.metadata["nbgrader"] = _marks(f"graded-{exercise}", grade=True, locked=True, points=1)
        cells.append(hidden)
    notebook.cells = cells
    return notebook


def _marks(name: str, **changes: object) -> dict[str, object]:
    """Nbgrader's metadata of a cell."""
    plain = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    return {**plain, "grade_id": name, **changes}


def check_in(code: str) -> str | None:
    """The call of `checks.check_…` in a cell."""
    for node in ast.walk(ast.parse(code)):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and function.attr.startswith("check_"):
            return ast.get_source_segment(code, node)
    return None


def release(sources: Path, folder: Path) -> Iterator[Path]:
    """Write an assignment for every source with exercises to nbgrader's course folder, and yield the notebooks.

    Hidden tests have other inputs at every call.
    """
    write_text(folder / "nbgrader_config.py", _CONFIG)
    seed = secrets.randbelow(10**6)
    for source in sorted(sources.glob("*.py")):
        notebook = graded(source, seed)
        if not any("nbgrader" in cell.metadata for cell in notebook.cells):
            continue
        path = folder / "source" / source.stem / f"{source.stem}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        yield path


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "build/course").resolve()
    if project_root().resolve() not in target.parents:
        sys.exit(f"{target} is outside the clone {project_root()}; choose a folder inside it")
    for written in release(project_root() / "notebooks" / "source", target):
        print(written, flush=True)
    print(f"next: cd {target} && nbgrader generate_assignment 01_imbalance  (pip install nbgrader)")
