"""Build the course's notebooks from their sources: `python -m dimaskdino.course.build`.

A source (`notebooks/source/NN_name.py`, Jupytext's percent format) is a chapter with the solutions of its exercises:

    def lag(box, mask):
        # solution
        return mask - box
        # end

It becomes `notebooks/NN_name.ipynb` without the solutions, and `notebooks/solutions/NN_name.ipynb` with them.

Once pyproject.toml has the repository's address (`[project.urls] Repository = "https://github.com/NAME/PROJECT"`), each
student's notebook also gets badges that open it in Colab and Binder, and a cell that sets Colab up.
"""

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

import jupytext
import nbformat
from nbformat import NotebookNode

from dimaskdino.errors import UserError

_BEGIN, _END = "# solution", "# end"
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def without_solutions(code: str) -> str:
    """Replace the code between `# solution` and `# end` by `...`.

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


_SET_UP = """# On Colab: download and install the kit, about two minutes. Elsewhere this does nothing.
import importlib.util
import subprocess
import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import quote

if importlib.util.find_spec("dimaskdino") is None:
    if not Path("kit").exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "kit"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "-e", "kit[notebooks]"], check=True)
    # what is installed while Python runs is only found at its next start
    sys.path += [str(Path(part).resolve()) for part in ("kit", "kit/ops")]
    importlib.invalidate_caches()
    %cd kit/notebooks"""


def repository(project: Path) -> str | None:
    """Address of the repository, as pyproject.toml has it, None if it has none."""
    urls = tomllib.loads(project.read_text())["project"].get("urls", {})
    return urls.get("Repository")


def online(address: str, name: str) -> list[NotebookNode]:
    """Cells with badges that open a chapter in Colab or Binder, and set-up for Colab.

    Raises:
        UserError: the address is not a repository on GitHub, which Colab and Binder need.
    """
    match = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?", address)
    if match is None:
        raise UserError(f"Colab and Binder need an address such as https://github.com/NAME/PROJECT, not {address}")
    file = f"notebooks/{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{match[1]}/blob/main/{file}"
    binder = f"https://mybinder.org/v2/gh/{match[1]}/main?urlpath={quote(f'lab/tree/{file}', safe='')}"
    badges = (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )
    return [nbformat.v4.new_markdown_cell(badges), nbformat.v4.new_code_cell(_SET_UP.replace("{address}", address))]


def notebooks_of(source: Path, address: str | None = None) -> tuple[NotebookNode, NotebookNode]:
    """The student's and the solved notebook of a source, without outputs."""
    versions = []
    for edit in (without_solutions, with_solutions):
        notebook = jupytext.read(source, fmt="py:percent")
        notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
        if address and edit is without_solutions:
            notebook.cells[1:1] = online(address, source.stem)
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # the same at every build, so that differences show changes alone
            if cell.cell_type == "code":
                cell.source = edit(cell.source)
        versions.append(notebook)
    return versions[0], versions[1]


def build(folder: Path) -> list[Path]:
    """Write the notebooks of all sources in `folder/source`; returns what was written."""
    written = []
    address = repository(folder.parent / "pyproject.toml")
    for source in sorted((folder / "source").glob("*.py")):
        targets = folder / f"{source.stem}.ipynb", folder / "solutions" / f"{source.stem}.ipynb"
        for target, notebook in zip(targets, notebooks_of(source, address), strict=True):
            target.parent.mkdir(exist_ok=True)
            nbformat.write(notebook, target)
            written.append(target)
    return written


if __name__ == "__main__":
    for path in build(Path(sys.argv[1] if len(sys.argv) > 1 else "notebooks").resolve()):
        print(path)
