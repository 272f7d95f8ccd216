"""Make the course's notebooks from their sources: `python -m dimaskdino.course.build`.

A source (`notebooks/source/NN_name.py`, Jupytext's percent format) is a chapter with the solutions of its exercises:

    def lag(box, mask):
        # solution
        return mask - box
        # end

It becomes `notebooks/NN_name.ipynb`, where each solution is left to the student, and
`notebooks/solutions/NN_name.ipynb`, where it stands.
"""

import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from dimaskdino.errors import UserError

_BEGIN, _END = "# solution", "# end"
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def without_solutions(code: str) -> str:
    """Replace what stands between `# solution` and `# end` by `...`.

    Raises:
        UserError: a solution that does not end, or ends without beginning.
    """
    kept: list[str] = []
    inside = False
    for line in code.splitlines():
        mark = line.strip()
        if mark in (_BEGIN, _END):
            if inside == (mark == _BEGIN):
                raise UserError(f"'{mark}' is out of place in an exercise:\n{code}")
            inside = not inside
            if inside:
                kept.append(f"{line[: len(line) - len(line.lstrip())]}...  # your code here")
        elif not inside:
            kept.append(line)
    if inside:
        raise UserError(f"a solution is not followed by '{_END}':\n{code}")
    return "\n".join(kept)


def with_solutions(code: str) -> str:
    """Drop the marks and keep the solutions."""
    return "\n".join(line for line in code.splitlines() if line.strip() not in (_BEGIN, _END))


def notebooks_of(source: Path) -> tuple[NotebookNode, NotebookNode]:
    """The student's and the solved notebook of a source, without outputs."""
    versions = []
    for edit in (without_solutions, with_solutions):
        notebook = jupytext.read(source, fmt="py:percent")
        notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # the same at every build, so that differences show changes alone
            if cell.cell_type == "code":
                cell.source = edit(cell.source)
        versions.append(notebook)
    return versions[0], versions[1]


def build(folder: Path) -> list[Path]:
    """Write the notebooks of all sources in `folder/source`; returns what was written."""
    written = []
    for source in sorted((folder / "source").glob("*.py")):
        targets = folder / f"{source.stem}.ipynb", folder / "solutions" / f"{source.stem}.ipynb"
        for target, notebook in zip(targets, notebooks_of(source), strict=True):
            target.parent.mkdir(exist_ok=True)
            nbformat.write(notebook, target)
            written.append(target)
    return written


if __name__ == "__main__":
    for path in build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("notebooks")):
        print(path)
