"""README and docs: blocks are what the records say, links lead somewhere, commands parse."""

import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from tyro.extras import SubcommandApp

from dimaskdino import cli

ROOT = Path(__file__).parents[2]
from tools.records import figures, records  # noqa: E402

PAGES = [*records.PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "ops/README.md"))]
PAGES.append(ROOT / "notebooks" / "studies" / "README.md")


@pytest.mark.parametrize("page", records.PAGES, ids=lambda page: page.name)
def test_blocks_are_what_the_records_say(page):
    assert records.rewritten(page.read_text()) == page.read_text(), "run `make figures`"


def test_a_changed_number_is_noticed():
    text = (ROOT / "docs" / "results.md").read_text()
    changed = text.replace("72.6", "72.7", 1)
    assert changed != text
    assert records.rewritten(changed) == text


TABLES = sorted(records.ARCHIVES.glob("*/*/table.md"))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: "/".join(table.parts[-3:-1]))
def test_tables_are_those_of_the_archived_runs(table):
    report = records.study_report(table.parent.name, table.parents[1].name)
    assert report.markdown() + "\n" == table.read_text(), "run `make figures`"


@pytest.mark.parametrize("table", [t for t in TABLES if t.parents[1].name != "shapes"], ids=lambda t: t.parent.name)
def test_all_registered_runs_of_a_study_are_there(table):
    report = records.study_report(table.parent.name, table.parents[1].name)
    assert {name: tuple(runs) for name, runs in report.measured.items()} == {
        variant.name: report.study.seeds for variant in report.study.variants
    }


def test_archives_of_studies_are_small():
    files = [file for file in records.ARCHIVES.rglob("*") if file.is_file()]
    assert len(TABLES) == 17
    assert len(files) <= 40
    assert sum(file.stat().st_size for file in files) < 8e6


def test_included_tables_are_those_of_the_studies():
    page = (ROOT / "docs" / "study.md").read_text()
    included = re.findall(
        r"<!-- records: table (\S+) (?:variants|differences) -->\n(.*?)\n<!-- end -->", page, re.DOTALL
    )
    assert included
    for file, table in included:
        assert f"\n\n{table}\n" in (ROOT / file).read_text()


def test_the_figures_are_those_that_are_drawn_and_shown():
    pictures = {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    shown = re.findall(r"figures/(\w+)\.png", "".join(page.read_text() for page in records.PAGES))
    assert pictures == {*figures.FIGURES, "scene"} == set(shown)  # the scene is the drawing without detections


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


def printed_commands(program: str) -> list[str]:
    """What the pages tell people to type, after the name of a program: lines of code blocks, and code in the text."""
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it has the commands of its time
            continue
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(rf"^(?:\S*python -m )?{program} (.+)$", text, re.MULTILINE)
        found += re.findall(rf"`{program} ([^`]+)`", text)
    assert found
    return found


def without_work(app: SubcommandApp) -> SubcommandApp:
    """The command line with its own parser, whose commands do nothing."""
    copied = SubcommandApp()
    for name, spec in app._subcommands.items():
        if isinstance(spec.target, SubcommandApp):
            copied.command(without_work(spec.target), name=name)
        else:
            copied.command(functools.wraps(spec.target)(lambda *_, **__: None), name=name)
    return copied


def test_commands_of_the_docs_parse(capsys):
    app = without_work(cli.app)
    for command in printed_commands("dimaskdino"):
        words = cli.settings_first(shlex.split(command, comments=True))
        if all(
            re.fullmatch("[a-z0-9]+", word) for word in words
        ):  # the name of a command, as in `dimaskdino data check`
            words.append("--help")
        try:
            app.cli(prog="dimaskdino", args=words)
        except SystemExit as stopped:
            if stopped.code:
                pytest.fail(f"dimaskdino {command}\n{capsys.readouterr()}")


def test_targets_and_modules_of_the_docs_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in printed_commands("make"):
        assert command.split()[0] in targets, command
    for page in PAGES[:-3]:
        for module in re.findall(r"python -m ((?:dimaskdino|tools|ms_deform_attn)[\w.]*)", page.read_text()):
            assert importlib.util.find_spec(module), module
