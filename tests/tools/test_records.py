"""README and docs: numbers come from records, links lead somewhere, commands exist, the README fits."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from PIL import Image
from small import FILE, MODEL

from dimaskdino.config import load_config
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.structures import Stage
from dimaskdino.studies.study import find_study, load_study

ROOT = Path(__file__).parents[2]
from tools.records import measure_bato, measure_ceilings, miniature_blocks, records, sources, study_blocks  # noqa: E402

TEXTS = [*records.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "ops" / "README.md"]
TEXTS += sorted((ROOT / "notebooks").glob("studies/README.md"))


def outside_blocks(text: str) -> str:
    """The page without its written blocks, code, links and tables of settings."""
    text = re.sub(r"<!-- records: \w+ -->.*?<!-- end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


@pytest.mark.parametrize("page", records.PAGES, ids=lambda page: page.name)
def test_blocks_are_what_the_records_say(page):
    assert records.rewritten(page.read_text()) == page.read_text(), "run `make figures`"


def test_a_changed_number_is_noticed():
    text = (ROOT / "docs" / "results.md").read_text()
    changed = text.replace("72.6", "72.7", 1)
    assert changed != text
    assert records.rewritten(changed) == text


@pytest.mark.parametrize(("folder", "name"), miniature_blocks.all_reports())
def test_tables_of_studies_are_what_the_runs_say(folder, name, tmp_path):
    study_blocks.report(name, folder).save(tmp_path)
    for file in ("table.json", "table.md"):
        committed = study_blocks.FOLDERS[folder] / name / file
        assert (tmp_path / file).read_text() == committed.read_text(), "run `make figures`"


def test_the_studys_notebook_makes_every_number_of_the_page(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    cells = nbformat.read(ROOT / "docs" / "study.ipynb", as_version=4).cells
    program = [cell.source for cell in cells if cell.cell_type == "code"]
    exec("\n".join(program[:-1]), {})  # without the figures
    page = (ROOT / "docs" / "study.md").read_text()
    assert len(shown) == page.count("<!-- records:") > 0
    assert all(text.data.split("\n\n", 1)[1] in page for text in shown)


def test_the_lag_is_compared_where_the_pilots_rule_says():
    levels = {quantity.at for quantity in load_study(find_study("box_formula")).quantities} - {None}
    assert levels == {miniature_blocks.equal_ap()}


@pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder, names in miniature_blocks.REGISTERED.items() for name in names]
)
def test_all_registered_runs_of_a_study_are_there(folder, name):
    seeds = {row: sorted(runs) for row, runs in study_blocks.report(name, folder).measured.items()}
    study = load_study(find_study(name))
    assert seeds == {row.name: sorted(study.seeds) for row in study.variants}


def test_with_both_parts_left_out_bato_is_not_there():
    settings = load_config(FILE, MODEL).model
    torch.manual_seed(0)
    detector = Detector(settings).eval()
    plain = Detector(settings.model_copy(update={"bato": settings.bato.model_copy(update={"enabled": False})})).eval()
    plain.load_state_dict({k: v for k, v in detector.state_dict().items() if not k.startswith("bato.")})
    images = ImageBatch.from_images([torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)], torch.device("cpu"))
    with torch.no_grad():
        wanted, found = plain(images).stages, {}
        for name, parts in measure_bato.LEFT_OUT.items():
            with measure_bato.without(SimpleNamespace(detector=detector), parts):
                found[name] = detector(images).stages
        after = detector(images).stages
    for name, stage in wanted.items():
        assert_same(found["both"][name], stage)
        assert_same(found["nothing"][name], after[name])
    assert_same(found["nothing"]["decoder.1"], wanted["decoder.1"])  # BATO acts after it
    last = {name: stages["decoder.2"] for name, stages in found.items()}
    torch.testing.assert_close(last["mask features"].class_logits, last["nothing"].class_logits)  # masks alone see them
    assert not torch.allclose(last["mask features"].mask_logits(), last["nothing"].mask_logits())
    assert not torch.allclose(last["tokens"].class_logits, last["nothing"].class_logits)


def assert_same(found: Stage, expected: Stage) -> None:
    torch.testing.assert_close(found.class_logits, expected.class_logits)
    torch.testing.assert_close(found.boxes, expected.boxes)
    if expected.has_masks:
        torch.testing.assert_close(found.mask_logits(), expected.mask_logits())


def test_the_record_of_ceilings_is_what_the_shapes_have(tmp_path):
    recorded = sources.measured("ceilings.json")["shapes"]["128"]
    found = measure_ceilings.shapes(tmp_path, 128)
    assert found.keys() == recorded.keys()
    for kind in ("mask", "mask2box", "bitmask"):
        assert found[kind]["mean"] == pytest.approx(recorded[kind]["mean"])
        assert found[kind]["per_class"] == pytest.approx(recorded[kind]["per_class"])


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/study.md"])
def test_results_stand_in_blocks_alone(name):
    prose = outside_blocks((ROOT / name).read_text())
    allowed = {"3.11", "2.11", "0.1", "0.2", "2.0", "2410.16707"}  # versions, and the paper's number
    assert not set(re.findall(r"\d+\.\d+", prose)) - allowed


def test_the_readme_fits():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 220


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
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


def test_figures_are_pictures_of_their_command():
    pictures = {path.stem for path in (ROOT / "docs" / "figures").glob("*.png")}
    source = (ROOT / "tools" / "records" / "figures.py").read_text()
    listed = re.search(r"FIGURES = \((.*?)\)", source)[1].split(", ")
    assert pictures == set(listed)
    for name in listed:
        with Image.open(ROOT / "docs" / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_commands_in_the_docs_exist():
    text = "\n".join(page.read_text() for page in TEXTS)
    used = set(re.findall(r"^dimaskdino ([a-z]+)", text, re.MULTILINE)) | set(re.findall(r"`dimaskdino ([a-z]+)", text))
    help_text = subprocess.run([sys.executable, "-m", "dimaskdino", "--help"], capture_output=True, text=True).stdout
    commands = set(re.search(r"\{([a-z,]+)\}", help_text)[1].split(","))
    assert used
    assert used <= commands
    modules = set(re.findall(r"python -m (dimaskdino[\w.]*)", text))
    for module in modules:
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").exists() or (
            ROOT / Path(*module.split("."))
        ).is_dir()
