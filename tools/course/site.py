"""The documentation site: `python -m tools.course.site` builds the pages; the chapters have their outputs.

Guides are the Markdown files of the repository; the reference comes from the docstrings. Needs the extra `site`
(`pip install -e '.[site]'`).
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
from dimaskdino.utils.progress import progress_bar


def with_alternative_texts(notebook: NotebookNode) -> NotebookNode:
    """The notebook with the alternative texts of its pictures where MyST looks for them."""
    made = nbformat.from_dict(notebook)
    for cell in made.cells:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return made


# pages of the site that are files elsewhere in the repository
PAGES = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def build(root: Path, output: Path, notebooks: list[Path]) -> Path:
    """Build the site.

    Args:
        root: the project's folder.
        output: folder for the sources (`source/`) and the site (`html/`); what was there is replaced.
        notebooks: the executed chapters, in their order.

    Returns:
        The site's first page.

    Raises:
        UserError: Sphinx reported a warning or an error; what it said is passed on.
    """
    shutil.rmtree(output, ignore_errors=True)
    source, html = output / "source", output / "html"
    shutil.copytree(root / "docs" / "site", source)
    shutil.copytree(root / "docs" / "figures", source / "figures")
    (source / "_static").mkdir()
    guides = {page.stem: page for page in (root / "docs").glob("*.md")}
    guides |= {name: root / file for name, file in PAGES.items()}
    known = {path.resolve(): f"{name}.md" for name, path in guides.items()}
    known |= {path.resolve(): path.name for path in notebooks}
    for name, path in guides.items():
        (source / f"{name}.md").write_text(_with_site_links(path.read_text(), path.parent, known))
    for path in progress_bar(notebooks, "chapters"):
        executed = with_alternative_texts(nbformat.read(path, as_version=4))
        for cell in executed.cells:
            if cell.cell_type == "markdown":
                cell.source = _with_site_links(cell.source, path.parent, known)
        nbformat.write(executed, source / path.name)
    names = "\n".join(path.stem for path in notebooks)
    course = (source / "course.md").read_text().replace("{{ chapters }}", names)
    (source / "course.md").write_text(course)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", str(source), str(html)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"Sphinx could not build the site:\n{done.stderr}")
    return html / "index.html"


def _with_site_links(markdown: str, folder: Path, known: Mapping[Path, str]) -> str:
    """Point links to pages of the site, and turn links to other files of the repository into text.

    Args:
        markdown: the text.
        folder: folder that its relative links start from.
        known: names of the site's pages by their files.
    """

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
