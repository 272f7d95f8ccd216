"""The course: notebooks made from their sources, executed, and checks that tell right from wrong."""

import base64
import io
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from golden import read, state_dict
from IPython.core.interactiveshell import InteractiveShell
from papermill import execute_notebook
from PIL import Image
from small import FILE, RUN, trained_file
from small import MODEL as SMALL_MODEL

from dimaskdino import load
from dimaskdino.course import begin
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.runs import RunFolder
from dimaskdino.utils.errors import UserError
from tools.course.build import for_reading, notebooks_of, repository, with_solutions, without_solutions

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"
SOURCES = sorted((NOTEBOOKS / "source").glob("*.py"))
SMALL = [*SMALL_MODEL, *RUN]
BASELINE = ("model.selection.k=[12]", "model.bato.enabled=false")
EXERCISE = "def f(x):\n    '''Doc.'''\n    # solution\n    y = x\n    return y\n    # end\n\n\nprint(f(1))"


def test_notebooks_are_stored_for_reading():
    buffer = io.BytesIO()  # a picture with colours that no palette of 256 holds
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    shown = {"image/png": png, "application/vnd.jupyter.widget-view+json": {}, "text/plain": "<Figure>"}
    alt = {"image/png": {"alt": "What it shows"}}
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="50 %"),
        nbformat.v4.new_output("stream", name="stdout", text="written: /some/where/kit/runs/mine"),
        nbformat.v4.new_output("execute_result", shown, execution_count=7, metadata=alt),
    ]
    metadata = {"papermill": {"status": "completed"}, "tags": ["varies"]}
    cell = nbformat.v4.new_code_cell("explore()", execution_count=7, metadata=metadata, outputs=outputs)
    executed = nbformat.v4.new_notebook(metadata={"widgets": {}, "papermill": {"duration": 1.0}}, cells=[cell])
    made = for_reading(executed, Path("/some/where/kit"))
    assert dict(made.metadata) == {}
    [cell] = made.cells
    assert (cell.execution_count, dict(cell.metadata)) == (1, {"tags": ["varies"]})
    text, result = cell.outputs  # without the progress bar
    assert text.text == "written: runs/mine"
    assert result.execution_count == 1
    assert set(result.data) == {"image/png", "text/plain"}
    assert result.data["text/plain"] == "What it shows"
    before, after = (Image.open(io.BytesIO(base64.b64decode(png))) for png in (png, result.data["image/png"]))
    assert (after.mode, after.size) == ("P", before.size)
    assert np.abs(np.asarray(before, float) - np.asarray(after.convert("RGB"), float)).mean() < 20


def test_the_student_gets_the_exercise_without_its_solution():
    assert without_solutions(EXERCISE) == "def f(x):\n    '''Doc.'''\n    ...  # your code here\n\n\nprint(f(1))"
    assert with_solutions(EXERCISE) == "def f(x):\n    '''Doc.'''\n    y = x\n    return y\n\n\nprint(f(1))"


@pytest.mark.parametrize("code", ["# solution\nx", "x\n# end", "# solution\n# solution\n# end"])
def test_marks_that_do_not_pair_are_named(code):
    with pytest.raises(UserError, match=r"'# solution' and '# end' do not pair"):
        without_solutions(code)


def test_a_lesson_begins_with_images_of_several_objects(shapes_data, tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)  # `begin` changes the folder; the test before it comes back
    lesson = begin(str(trained_file(tmp_path / "model.safetensors", shapes_data)))
    assert Path.cwd() == NOTEBOOKS.parent
    counts = [min(len(look.sample.labels), 3) for look in lesson.looks(99)]
    assert len(counts) == len(lesson.data)
    assert counts == sorted(counts, reverse=True)
    assert len(lesson.looks(2)) == 2


def test_shipped_models_have_their_results_and_records():
    models = NOTEBOOKS / "models"
    for name in ("dimaskdino", "maskdino"):
        trained = load(models / name)
        assert trained.step == trained.config.schedule.steps == 10_000
        assert list(LayerwiseAP.load(models / name / "evaluation" / "layers.json").stages)[-1] == "decoder.4"
        assert RunFolder(models / name).read_metrics()[-1]["step"] == 10_000


ADDRESS = "https://github.com/someone/some-kit"


def test_badges_open_the_chapter_of_the_address():
    student, solved = notebooks_of(SOURCES[0], ADDRESS)
    badges, setup = student.cells[1:3]
    file = f"notebooks/{SOURCES[0].stem}.ipynb"
    assert f"(https://colab.research.google.com/github/someone/some-kit/blob/main/{file})" in badges.source
    assert f"/gh/someone/some-kit/main?urlpath=lab%2Ftree%2F{file.replace('/', '%2F')})" in badges.source
    assert ADDRESS in setup.source
    assert len(solved.cells) == len(student.cells) - 2
    with pytest.raises(UserError, match=r"not https://example\.org/kit"):
        notebooks_of(SOURCES[0], "https://example.org/kit")


def test_the_set_up_cell_does_nothing_where_the_kit_is(tmp_path):
    cell = notebooks_of(SOURCES[0], ADDRESS)[0].cells[2].source
    shell = InteractiveShell.instance()
    assert shell.run_cell(cell).success
    assert not Path("kit").exists()


def stored(source):
    """The notebooks of a source that the repository has: the student's and the solved one."""
    paths = NOTEBOOKS / f"{source.stem}.ipynb", NOTEBOOKS / "solutions" / f"{source.stem}.ipynb"
    return [nbformat.read(path, as_version=4) for path in paths]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebooks_are_what_their_source_makes(source):
    made = notebooks_of(source, repository(NOTEBOOKS.parent / "pyproject.toml"))
    for found, expected in zip(stored(source), made, strict=True):
        cells = [[(cell.id, cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (found, expected)]
        assert cells[0] == cells[1], f"{source.stem}: run `make notebooks`"
    assert "# solution" not in nbformat.writes(stored(source)[0])


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_exercises_fit_into_the_minutes_of_the_chapter_and_of_the_guide(source):
    text = "\n".join(cell.source for cell in notebooks_of(source)[0].cells if cell.cell_type == "markdown")
    stated = int(re.search(r"\*Time\*: (\d+) minutes", text)[1])
    minutes = re.findall(r"^### (?:Exercise|Build it).*\n\n\*[^*]*?(\d+) minutes?\.\*", text, re.M)
    assert len(minutes) == text.count("### Exercise") + text.count("### Build it")
    assert sum(map(int, minutes)) <= 0.75 * stated
    chapter = text.removeprefix("# ").split()[0]
    guide = (NOTEBOOKS.parent / "docs" / "instructors.md").read_text()
    assert re.findall(rf"^\| {chapter}[^|]* \| (\d+) \| ", guide, re.M) == [str(stated)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_chapters_are_stored_with_their_outputs(source):
    """Every cell that shows something has its output; nothing of the machine that made it is in them."""
    for notebook in stored(source):
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        shown = [output for cell in code for output in cell.outputs]
        assert sum("image/png" in output.get("data", {}) for output in shown) >= 2
        for output in shown:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not {"application/vnd.jupyter.widget-view+json"} & set(output.get("data", {}))
        text = nbformat.writes(notebook)
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)
        assert "Warning" not in text
        for cell in code:
            last = cell.source.rstrip().splitlines()[-1]
            if re.match(r"(draw|plot|explore|Explorer|print|Markdown|checks\.check_)", last):
                assert cell.outputs, cell.source


def numbers_in(notebook):
    """The numbers that each cell prints or shows as text, without speeds and those of cells tagged as varying."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "varies" not in cell.metadata.get("tags", []):
            texts = [o.get("text", "") or str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
            text = re.sub(r"[\d.]+ images/s", "", " ".join(texts))
            found[cell.id] = [float(n) for n in re.findall(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?", text)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_stored_numbers_are_those_of_a_new_execution(source, tmp_path):
    path = tmp_path / "plain.ipynb"
    solved = notebooks_of(source, None)[1]
    nbformat.write(solved, path)
    again = for_reading(execute_notebook(str(path), None, cwd=NOTEBOOKS, progress_bar=False), NOTEBOOKS.parent)
    before, after = numbers_in(stored(source)[1]), numbers_in(again)
    assert before.keys() == after.keys()
    for cell, values in before.items():
        assert after[cell] == pytest.approx(values, rel=0.02, abs=0.02), cell


def parameters_of(source, model, baseline, folder):
    """Small settings for a chapter."""
    both = {"model": str(model), "images": 2}
    return {
        "00_detr": {"steps": 5},
        "01_imbalance": both | {"baseline": str(baseline), "solids": str(model)},
        "06_training": {"model": str(model)},
        "02_evaluation": {"model": str(model)},
        "07_ablations": {},
        "08_your_photographs": {
            **{"model": str(model), "config": str(FILE), "folder": str(folder / "own"), "overrides": list(SMALL)},
            **{"train_images": 6, "val_images": 4, "steps": 3},
        },
    }.get(source.stem, both)


def execute(notebook, folder, parameters):
    done = execute_notebook(str(notebook), str(folder / "out.ipynb"), parameters, cwd=NOTEBOOKS, progress_bar=False)
    return done, "".join(
        o.get("text", "") for c in done.cells for o in c.get("outputs", []) if o.output_type == "stream"
    )


@pytest.mark.slow
@pytest.mark.parametrize("solved", [False, True], ids=["student", "solutions"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_chapters_run(source, solved, shapes_data, tmp_path):
    notebook = NOTEBOOKS / ("solutions" if solved else "") / f"{source.stem}.ipynb"
    model = trained_file(tmp_path / "model.safetensors", shapes_data)
    baseline = trained_file(tmp_path / "baseline.safetensors", shapes_data, *BASELINE)
    done, printed = execute(notebook, tmp_path, parameters_of(source, model, baseline, tmp_path))
    verdict = "agrees with the package" if solved else "returns nothing yet"
    assert printed.count(verdict) == sum("checks.check_" in cell.source for cell in done.cells)
    assert "✗" not in printed
    assert not re.search(r"\b[1-9]\d* problems", printed)  # of the data that chapter 8 makes
    assert "Warning" not in printed


@pytest.mark.slow
def test_the_last_chapter_shows_a_published_checkpoint(shapes_data, tmp_path):
    torch.save({"model": state_dict(read("di_small"))}, tmp_path / "published.pth")
    parameters = {
        "checkpoint": str(tmp_path / "published.pth"),
        "photos": str(shapes_data / "images" / "val"),
        "images": 2,
        "overrides": [
            *("model.classes=7", "model.pixel_decoder.layers=2", "model.pixel_decoder.ffn_dim=128"),
            *("model.selection.k=[90,40]", "model.decoder.layers=3", "model.decoder.ffn_dim=96"),
            *("model.bato.guiding_tokens=12", "data.resize.shortest=64", "data.resize.longest=64"),
        ],
    }
    _, printed = execute(NOTEBOOKS / "09_coco_weights.ipynb", tmp_path, parameters)
    assert "7 classes: class 1, class 2" in printed
