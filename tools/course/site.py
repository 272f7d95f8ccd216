"""Build the documentation site with Sphinx: `python -m tools.course.site` (needs `pip install -e '.[site]'`).

Guides are the repository's Markdown files, chapters its executed notebooks; the reference comes from the docstrings.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dimaskdino.runs.processes import project_root
from dimaskdino.utils.errors import UserError

# pages of the site that are files elsewhere in the repository
PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def build(root: Path, output: Path, notebooks: list[Path]) -> Path:
    """Build the site of the project in `root` with its executed notebooks, and return the first page.

    The folder `output` is replaced: `source/` has the sources, `html/` the site.

    Raises:
        UserError: Sphinx reported a warning or an error.
    """
    shutil.rmtree(output, ignore_errors=True)
    source, html = output / "source", output / "html"
    shutil.copytree(root / "docs" / "site", source)
    shutil.copytree(root / "docs" / "figures", source / "figures")
    guides = {page.stem: page for page in (root / "docs").glob("*.md")}
    guides |= {name: root / file for name, file in PAGES.items()}
    known = {path.resolve(): path.name for path in notebooks}
    for name, path in guides.items():
        known[path.resolve()] = f"{name}.md"
    for name, path in guides.items():
        (source / f"{name}.md").write_text(_with_site_links(path.read_text(), path.parent, known))
    for path in notebooks:
        nbformat.write(chapter_page(path, known), source / path.name)
    course = source / "course.md"
    course.write_text(course.read_text().replace("{{ chapters }}", "\n".join(path.stem for path in notebooks)))
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", str(source), str(html)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"Sphinx could not build the site:\n{done.stderr}")
    return html / "index.html"


def chapter_page(path: Path, known: Mapping[Path, str]) -> NotebookNode:
    """An executed chapter with links to the site's pages, and its alternative texts where MyST looks for them."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _with_site_links(cell.source, path.parent, known)
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return notebook


def _with_site_links(markdown: str, folder: Path, known: Mapping[Path, str]) -> str:
    """Point relative links of a file in `folder` to the known pages of the site; links to other files become text."""

    def link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path, hash_mark, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        found = known.get((folder / path).resolve())
        # MyST writes anchors in small letters, notebooks as the heading has them
        return text if found is None else f"[{text}]({found}{hash_mark}{anchor.lower()})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)]+)\)", link, markdown)


if __name__ == "__main__":
    folder = project_root()
    chapters = sorted((folder / "notebooks").glob("0*.ipynb"))
    print(f"written: {build(folder, folder / 'build' / 'site', chapters)}")
