"""Build and execute the course's notebooks from their sources: `python -m tools.course.build`.

A source (`notebooks/source/NN_name.py`, Jupytext's percent format) is a chapter with the solutions of its exercises:

    def imbalance(box, mask):
        # solution
        return mask - box
        # end

It becomes `notebooks/NN_name.ipynb` without the solutions, and `notebooks/solutions/NN_name.ipynb` with them. Both are
stored with their outputs, so that the course can be read without an installation: explorers as pictures, pictures with
a palette of 256 colours, no progress bars, no paths of the machine that built them.

If pyproject.toml has the repository's address (`[project.urls] Repository = "https://github.com/NAME/PROJECT"`), each
student's notebook also gets badges that open it in Colab and Binder, and a cell that sets Colab up.
"""

import base64
import io
import re
import sys
import tempfile
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote

import jupytext
import nbformat
from nbformat import NotebookNode
from papermill import execute_notebook
from PIL import Image

from dimaskdino.runs.notebooks import kernel_config
from dimaskdino.runs.processes import project_root
from dimaskdino.utils.errors import UserError
from tools.course.glossary import link_first_uses, symbols_of, terms_of

BEGIN, END = "# solution", "# end"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def without_solutions(code: str) -> str:
    """Replace the code between `# solution` and `# end` by `...`.

    Raises:
        UserError: the marks do not pair.
    """
    shown, count = re.subn(rf"(?ms)^( *){BEGIN}\n.*?^ *{END}$", r"\1...  # your code here", code)
    marks = [line.strip() for line in code.splitlines()]
    if not count == marks.count(BEGIN) == marks.count(END):
        raise UserError(f"'{BEGIN}' and '{END}' do not pair in an exercise:\n{code}")
    return shown


def with_solutions(code: str) -> str:
    """Drop the marks and keep the solutions."""
    return "\n".join(line for line in code.splitlines() if line.strip() not in (BEGIN, END))


_SET_UP = """# On Colab: download and install the kit, about two minutes. Elsewhere this does nothing.
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("dimaskdino") is None:
    if not Path("kit").exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "kit"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "-e", "kit[notebooks]"], check=True)
    # a running Python does not find newly installed packages
    sys.path += [str(Path(part).resolve()) for part in ("kit", "kit/ops")]
    importlib.invalidate_caches()
    %cd kit/notebooks"""


def repository(project: Path) -> str | None:
    """Address of the repository in pyproject.toml; None if it has none."""
    return tomllib.loads(project.read_text())["project"].get("urls", {}).get("Repository")


def online(address: str, name: str) -> list[NotebookNode]:
    """A cell with badges that open a chapter in Colab or Binder, and the set-up for Colab; the address is GitHub's."""
    match = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?", address)
    if match is None:
        raise UserError(f"Colab and Binder need an address such as https://github.com/NAME/PROJECT, not {address}")
    colab, binder, file = "https://colab.research.google.com", "https://mybinder.org", f"notebooks/{name}.ipynb"
    lab = quote(f"lab/tree/{file}", safe="")
    badges = (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{match[1]}/blob/main/{file}) "
        f"[![Open in Binder]({binder}/badge_logo.svg)]({binder}/v2/gh/{match[1]}/main?urlpath={lab})"
    )
    return [nbformat.v4.new_markdown_cell(badges), nbformat.v4.new_code_cell(_SET_UP.replace("{address}", address))]


def read_source(source: Path) -> NotebookNode:
    """A chapter without outputs, with its solutions between marks and links to the glossary of the first chapter."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    explained = min(source.parent.glob("*.py"))
    if source != explained:
        prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        terms = terms_of(explained), symbols_of(explained)
        linked = link_first_uses([cell.source for cell in prose], *terms, f"{explained.stem}.ipynb")
        for cell, text in zip(prose, linked, strict=True):
            cell.source = text
    return notebook


def notebooks_of(source: Path, address: str | None = None) -> tuple[NotebookNode, NotebookNode]:
    """The student's and the solved notebook of a source, without outputs."""
    versions = []
    for edit in (without_solutions, with_solutions):
        notebook = read_source(source)
        if address and edit is without_solutions:
            notebook.cells[1:1] = online(address, source.stem)
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # the same at every build, so that differences show changes alone
            if cell.cell_type == "code":
                cell.source = edit(cell.source)
        versions.append(notebook)
    return versions[0], versions[1]


def build(folder: Path, only: Collection[str] = ()) -> Iterator[Path]:
    """Write and execute the notebooks of the sources in `folder/source`, and yield their paths.

    `only` has the beginnings of the names of the chapters to build, such as `03`; all by default.
    """
    address = repository(folder.parent / "pyproject.toml")
    for source in sorted((folder / "source").glob("*.py")):
        if only and not source.stem.startswith(tuple(only)):
            continue
        targets = folder / f"{source.stem}.ipynb", folder / "solutions" / f"{source.stem}.ipynb"
        for target, notebook in zip(targets, notebooks_of(source, address), strict=True):
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as made:
                plain = Path(made) / target.name
                nbformat.write(notebook, plain)
                done = execute_notebook(str(plain), None, cwd=folder, progress_bar=False, config=kernel_config())
            nbformat.write(for_reading(done, folder.parent), target)
            yield target


def for_reading(executed: NotebookNode, root: Path) -> NotebookNode:
    """An executed notebook as it is stored; the project's folder `root` is left out of paths in texts."""
    made = nbformat.from_dict(executed)
    for name in ("widgets", "papermill"):
        made.metadata.pop(name, None)
    number = 0
    for cell in made.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "text" in output:
                output.text = output.text.replace(f"{root}/", "")
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            if "image/png" in data:
                data["image/png"] = base64.b64encode(with_palette(base64.b64decode(data["image/png"]))).decode()
                data["text/plain"] = output.metadata.get("image/png", {}).get("alt", data.get("text/plain", ""))
    return made


def with_palette(png: bytes) -> bytes:
    """A PNG with a palette of 256 colours, about a third of the size."""
    buffer, picture = io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    for path in build(project_root() / "notebooks", sys.argv[1:]):
        print(path, flush=True)
