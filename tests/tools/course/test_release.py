"""Assignments for nbgrader: solutions pass the hidden tests, and printing a tick does not."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from dimaskdino.course import checks
from dimaskdino.utils.errors import UserError
from tools.course.release import check_in, graded, release

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "notebooks" / "source").glob("*.py"))

SMALL = """# %% [markdown]
# # A chapter

# %%
from dimaskdino.course import checks

# %%
def imbalance(box_ap, mask_ap):
    # solution
    return mask_ap - box_ap
    # end


checks.check_imbalance(imbalance)

# %%
def corners(cx, cy, w, h):
    # solution
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    # end


checks.check_corners(corners)
"""


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_exercise_is_graded(source):
    notebook = graded(source, 5)
    names = [cell.metadata["nbgrader"]["grade_id"] for cell in notebook.cells if "nbgrader" in cell.metadata]
    exercises = sum("# solution\n" in cell for cell in source.read_text().split("# %%"))
    assert names == [f"{kind}-{i}" for i in range(1, exercises + 1) for kind in ("exercise", "graded")]
    nbformat.validate(notebook)
    for cell, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.metadata.get("nbgrader", {}).get("solution"):
            assert after.metadata["nbgrader"]["grade"]
            assert after.metadata["nbgrader"]["locked"]
            assert f"assert {check_in(cell.source)}\n" in after.source


def solved_functions(source: Path):
    """Each exercise's function with its check, where it needs nothing but what the chapter imports."""
    names: dict = {}
    for cell in jupytext.read(source, fmt="py:percent").cells:
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(source), "exec"), names)
        if "# solution" not in cell.source:
            continue
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        exec(compile(ast.Module(functions, []), str(source), "exec"), names)
        call = ast.parse(check_in(cell.source), mode="eval").body
        if all(isinstance(argument, ast.Name) and argument.id in names for argument in call.args):
            yield getattr(checks, call.func.attr), *(names[argument.id] for argument in call.args)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_solutions_pass_with_inputs_that_the_course_does_not_show(source):
    for check, *arguments in solved_functions(source):
        seen: list = []

        def recorded(*inputs, function=arguments[0], seen=seen):
            seen.append(repr(inputs))
            return function(*inputs)

        assert check(recorded, *arguments[1:])
        shown = set(seen)
        for seed in (1, 2):
            with checks.other_cases(seed):
                assert check(recorded, *arguments[1:])
            assert set(seen) - shown, f"{check.__name__} has no other inputs"
            shown = set(seen)


def test_an_exercise_without_a_check_is_named(tmp_path):
    (tmp_path / "x.py").write_text("# %%\ndef f():\n    # solution\n    return 1\n    # end\n")
    with pytest.raises(UserError, match="an exercise without a call of checks"):
        graded(tmp_path / "x.py", 1)


@pytest.mark.slow
def test_nbgrader_gives_points_for_solutions_alone(tmp_path):
    pytest.importorskip("nbgrader", reason="pip install nbgrader")
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "00_small.py").write_text(SMALL)
    folder = tmp_path / "course"
    assert [path.name for path in release(tmp_path / "sources", folder)] == ["00_small.ipynb"]

    def nbgrader(*arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, "-m", "nbgrader", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    nbgrader("generate_assignment", "00_small")
    released = nbformat.read(folder / "release" / "00_small" / "00_small.ipynb", 4)
    text = "\n".join(cell.source for cell in released.cells)
    assert "your code here" in text
    assert "return mask_ap" not in text
    assert "HIDDEN" not in text
    assert "other_cases" not in text
    bodies = {
        "solver": ("return mask_ap - box_ap", "return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2"),
        "half": ("return mask_ap - box_ap", "..."),
        "printer": ('print("✓ imbalance agrees with the package on 3 cases.")', "..."),
        "learner": ("return {31.0: 4.5, 40.0: -2.0, 0.0: 0.0}[box_ap]", "..."),  # by heart
    }
    for student, answers in bodies.items():
        notebook, rest = nbformat.from_dict(released), list(answers)
        for cell in notebook.cells:
            if "...  # your code here" in cell.source:
                cell.source = cell.source.replace("...  # your code here", rest.pop(0))
        place = folder / "submitted" / student / "00_small"
        place.mkdir(parents=True)
        nbformat.write(notebook, place / "00_small.ipynb")
    nbgrader("autograde", "00_small")
    code = (
        "from nbgrader.api import Gradebook\n"
        "with Gradebook('sqlite:///gradebook.db') as book:\n"
        "    print({s.student.id: s.score for s in book.assignment_submissions('00_small')})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == {"solver": 2.0, "half": 1.0, "printer": 0.0, "learner": 0.0}
