"""The course: notebooks made from their sources, executed, and checks that tell right from wrong."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from golden import read, state_dict
from IPython.core.interactiveshell import InteractiveShell
from papermill import execute_notebook
from small import FILE, RUN, trained_file
from small import MODEL as SMALL_MODEL
from torchvision.ops import box_iou

from dimaskdino import load
from dimaskdino.course import begin, checks
from dimaskdino.course.build import notebooks_of, repository, with_solutions, without_solutions
from dimaskdino.errors import UserError
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.runs import RunFolder
from dimaskdino.studies.study import load_study

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
SOURCES = sorted((NOTEBOOKS / "source").glob("*.py"))
SMALL = [*SMALL_MODEL, *RUN]
BASELINE = ("model.selection.k=[12]", "model.bato.enabled=false")
EXERCISE = "def f(x):\n    '''Doc.'''\n    # solution\n    y = x\n    return y\n    # end\n\n\nprint(f(1))"


def test_the_student_gets_the_exercise_without_its_solution():
    assert without_solutions(EXERCISE) == "def f(x):\n    '''Doc.'''\n    ...  # your code here\n\n\nprint(f(1))"
    assert with_solutions(EXERCISE) == "def f(x):\n    '''Doc.'''\n    y = x\n    return y\n\n\nprint(f(1))"


@pytest.mark.parametrize("code", ["# solution\nx", "x\n# end", "# solution\n# solution\n# end"])
def test_marks_that_do_not_pair_are_named(code):
    with pytest.raises(UserError, match=r"out of place|not followed"):
        without_solutions(code)


def test_a_lesson_begins_with_images_of_several_objects(shapes_data, tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)  # `begin` changes the folder; the test before it comes back
    lesson = begin(str(trained_file(tmp_path / "model.safetensors", shapes_data)))
    assert Path.cwd() == NOTEBOOKS.parent
    counts = [min(len(look.sample.labels), 3) for look in lesson.looks(99)]
    assert len(counts) == len(lesson.data)
    assert counts == sorted(counts, reverse=True)
    assert len(lesson.looks(2)) == 2


def test_shipped_models_are_small_and_say_what_they_reach():
    models = NOTEBOOKS / "models"
    assert sum(file.stat().st_size for file in models.rglob("*.safetensors")) < 25e6
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


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebooks_are_what_their_source_makes(source):
    stored = NOTEBOOKS / f"{source.stem}.ipynb", NOTEBOOKS / "solutions" / f"{source.stem}.ipynb"
    for path, made in zip(stored, notebooks_of(source, repository(NOTEBOOKS.parent / "pyproject.toml")), strict=True):
        found = nbformat.read(path, as_version=4)
        assert found == made, f"{path.name}: run python -m dimaskdino.course.build"
        assert len(found.cells) < 40
    text = "".join(cell.source for cell in nbformat.read(stored[0], as_version=4).cells)
    assert "# solution" not in text
    assert 2 <= text.count("### Exercise") <= 4


def parameters_of(source, model, baseline, folder):
    """Small settings for a chapter."""
    both = {"model": str(model), "images": 2}
    return {
        "01_imbalance": both | {"baseline": str(baseline)},
        "05_training": {"model": str(model)},
        "06_evaluation": {"model": str(model)},
        "07_ablations": {},
        "08_your_own": {
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
    verdicts = "✓" if solved else "○"
    assert printed.count(verdicts) == sum("checks.check_" in cell.source for cell in done.cells)
    assert "✗" not in printed
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
    _, printed = execute(NOTEBOOKS / "09_coco_checkpoint.ipynb", tmp_path, parameters)
    assert "7 classes: class 1, class 2" in printed


WRONG = {
    checks.check_imbalance: lambda box, mask: box - mask,
    checks.check_box_iou: lambda a, b: torch.tensor(1.0),
    checks.check_mask_iou: lambda a, b: (a & b).sum() / a.sum(),
    checks.check_bilinear: lambda values, x, y: float(values[int(y * len(values)), int(x * len(values[0]))]),
    checks.check_samples: lambda q, heads, levels, points: q * heads * levels * points,
    checks.check_select: lambda logits, k: logits.sum(-1).topk(k).indices,
    checks.check_mask_to_box: lambda mask: torch.zeros(4),
    checks.check_recall: lambda owners, objects: len(owners) / objects,
    checks.check_cross_attention: lambda q, k, v: (q @ k.T).softmax(dim=1) @ v,
    checks.check_mask_probability: lambda embedding, features: torch.einsum("c,chw->hw", embedding, features),
    checks.check_own_share: lambda attention, tokens, guides: float((attention * (tokens[:, None] == guides)).mean()),
    checks.check_cheapest: lambda cost: (cost.argmin(dim=0), False),
    checks.check_giou: lambda a, b: float(box_iou(a[None], b[None])),
    checks.check_dice_loss: lambda p, t: 1 - 2 * (p * t).sum() / (p.sum() + t.sum()),
    checks.check_right_ones: lambda iou, threshold: (iou.amax(1) >= threshold).tolist(),
    checks.check_precision_recall: lambda right, objects: (np.cumsum(right) / len(right), np.cumsum(right) / objects),
    checks.check_unpaired: lambda a, b: (sum(b) / len(b) - sum(a) / len(a), 0.0),
    checks.check_annotation: lambda mask: ([0, 0, 1, 1], int(mask.sum())),
    checks.check_gate: lambda before, after, gate: gate * after,
    checks.check_best_queries: lambda logits, n: logits.amax(1).topk(min(n, len(logits))).indices,
    checks.check_interpolated: lambda precision, recall: np.interp(np.linspace(0, 1, 101), recall, precision),
}


@pytest.mark.parametrize("check", WRONG, ids=lambda c: c.__name__)
def test_checks_explain_what_is_wrong(check, capsys):
    assert not check(WRONG[check])
    printed = capsys.readouterr().out
    assert printed.startswith("✗")
    assert "Hint: " in printed
    assert "expected" in printed


@pytest.mark.parametrize("check", WRONG, ids=lambda c: c.__name__)
def test_checks_take_whatever_a_student_writes(check, capsys):
    def stops(*arguments):
        raise KeyError("oh")

    assert not check(lambda *arguments: None)
    assert not check(lambda *arguments: ...)
    assert not check(stops)
    assert not check(lambda *arguments: "text")
    printed = capsys.readouterr().out
    assert printed.count("returns nothing yet") == 2
    assert "stopped with KeyError: 'oh'" in printed
    assert "got str" in printed or "got 'text'" in printed


def test_settings_that_differ_are_named(capsys):
    study = load_study(NOTEBOOKS.parent / "configs" / "ablations" / "table_7.yaml")
    assert checks.check_settings(lambda: ["model.selection.k=[80, 60, 40]"], "triple", study)
    for wrong, words in (
        (lambda: ["model.selection.k=[80, 40]"], "model.selection.k is (80, 40)"),
        (lambda: ["model.selektion.k=[80, 40]"], "did you mean"),
        (lambda: "model.selection.k=[80, 60, 40]", "expected a list of texts"),
        (lambda: ..., "returns nothing yet"),
    ):
        assert not checks.check_settings(wrong, "triple", study)
        assert words in capsys.readouterr().out
