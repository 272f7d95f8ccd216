"""The course: notebooks made from their sources, executed, and checks that tell right from wrong."""

import base64
import io
import re
from functools import partial
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
from torch.nn import functional
from torchvision.ops import box_iou

from dimaskdino import load
from dimaskdino.config import Shapes
from dimaskdino.course import begin, checks
from dimaskdino.course.build import for_reading, notebooks_of, repository, with_solutions, without_solutions
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import collate, training_dataset
from dimaskdino.data.shapes import generate
from dimaskdino.errors import UserError
from dimaskdino.evaluation.coco_ap import read_truth
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, detect_layers
from dimaskdino.modeling import ImageBatch
from dimaskdino.modeling.layers import inverse_sigmoid, sine_boxes
from dimaskdino.runs import RunFolder
from dimaskdino.studies.study import load_study

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
SOURCES = sorted((NOTEBOOKS / "source").glob("*.py"))
SMALL = [*SMALL_MODEL, *RUN]
BASELINE = ("model.selection.k=[12]", "model.bato.enabled=false")
_BUFFER = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(_BUFFER, "PNG")
PICTURE = base64.b64encode(_BUFFER.getvalue()).decode()
# a picture with colours that no palette of 256 holds, and what papermill and a machine leave in a notebook
EXECUTED = nbformat.v4.new_notebook(
    metadata={"widgets": {}, "papermill": {"duration": 1.0}},
    cells=[
        nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["injected-parameters"]}),
        nbformat.v4.new_code_cell(
            "explore()",
            execution_count=7,
            metadata={"papermill": {"status": "completed"}, "tags": ["varies"]},
            outputs=[
                nbformat.v4.new_output("stream", name="stderr", text="50 %"),
                nbformat.v4.new_output("stream", name="stdout", text="written: /some/where/kit/runs/mine"),
                nbformat.v4.new_output(
                    "execute_result",
                    {"image/png": PICTURE, "application/vnd.jupyter.widget-view+json": {}, "text/plain": "<Figure>"},
                    execution_count=7,
                    metadata={"image/png": {"alt": "What it shows"}},
                ),
            ],
        ),
    ],
)
EXERCISE = "def f(x):\n    '''Doc.'''\n    # solution\n    y = x\n    return y\n    # end\n\n\nprint(f(1))"


def test_notebooks_are_stored_for_reading():
    made = for_reading(EXECUTED, Path("/some/where/kit"))
    assert dict(made.metadata) == {}
    [cell] = made.cells  # without the parameters that papermill injected
    assert (cell.execution_count, dict(cell.metadata)) == (1, {"tags": ["varies"]})
    text, result = cell.outputs  # without the progress bar
    assert text.text == "written: runs/mine"
    assert result.execution_count == 1
    assert set(result.data) == {"image/png", "text/plain"}
    assert result.data["text/plain"] == "What it shows"
    before, after = (Image.open(io.BytesIO(base64.b64decode(png))) for png in (PICTURE, result.data["image/png"]))
    assert (after.mode, after.size) == ("P", before.size)
    assert np.abs(np.asarray(before, float) - np.asarray(after.convert("RGB"), float)).mean() < 20
    assert nbformat.writes(for_reading(EXECUTED, Path("/some/where/kit"))) == nbformat.writes(made)  # small diffs


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
        assert len(found.cells) < 45
    text = "".join(cell.source for cell in stored(source)[0].cells)
    assert "# solution" not in text
    assert 2 <= text.count("### Exercise") <= 4
    for part in (
        "**Question.**",
        "**You will be able to**",
        "*Prerequisites*",
        "**In three sentences.**",
        "**Read on.**",
    ):
        assert text.count(part) == 1, part


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


def test_all_notebooks_together_are_small():
    files = [*NOTEBOOKS.glob("*.ipynb"), *(NOTEBOOKS / "solutions").glob("*.ipynb")]
    assert sum(file.stat().st_size for file in files) < 12e6


def numbers_in(notebook):
    """The numbers that each cell prints or shows as text, without those of cells tagged as varying."""
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and "varies" not in cell.metadata.get("tags", []):
            texts = [o.get("text", "") or str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs]
            found[cell.id] = [float(n) for n in re.findall(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?", " ".join(texts))]
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


WRONG = {
    checks.check_corners: lambda cx, cy, w, h: (cx - w, cy - h, cx + w, cy + h),
    checks.check_cheapest_assignment: lambda cost: tuple(cost.argmin(0).tolist()),
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


BUILT = (
    checks.check_attended,
    checks.check_second_selection,
    checks.check_guided_tokens,
    checks.check_matching_cost,
    checks.check_average_precision,
)


def test_what_students_build_is_compared_with_the_model(shapes_data, tmp_path, capsys):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data))
    look = model.inspect(CocoDataset(shapes_data, "val")[0])

    def second_selection(T_s1, block, heads, k, interact=True, best_first=True):
        x, boxes = T_s1.content, T_s1.boxes
        for layer in block.layers:
            x = layer(x, block.position(sine_boxes(boxes, x.shape[-1])), False)[0] if interact else x
            boxes = (block.box(x) + inverse_sigmoid(boxes)).sigmoid()
        rows = heads.label(block.norm(x)).amax(-1).topk(k, dim=1).indices[0]
        return rows if best_first else rows.flip(0)

    def guided_tokens(T_i, position, mask, box, bato, ffn=True, residual=0.0):
        x = bato.attention(T_i, T_i + position, mask + box, mask)[0]
        return (bato.ffn(x) if ffn else x) + residual

    def attended(maps, boxes, offsets, scores, unit=None, over_all=True):
        unit = boxes[:, None, None, None, 2:] * (0.5 / offsets.shape[3]) if unit is None else unit
        places = boxes[:, None, None, None, :2] + offsets * unit
        weights = scores.flatten(2).softmax(-1).view(scores.shape) if over_all else scores.softmax(-1)
        total = 0
        for level, values in enumerate(maps):
            read = functional.grid_sample(values, 2 * places[:, :, level].transpose(0, 1) - 1, align_corners=False)
            total = total + (read * weights[:, :, level].transpose(0, 1)[:, None]).sum(-1)
        return total.permute(2, 0, 1).flatten(1)

    cases = (
        (checks.check_attended, attended, {}, "reads what the model's 12 queries read"),
        (checks.check_attended, attended, {"unit": 1.0}, "they count in parts of the box"),
        (checks.check_attended, attended, {"over_all": False}, "all levels of a head share one"),
        (checks.check_attended, lambda *given: 2 * attended(*given), {}, "is farthest from the model's"),
        (checks.check_attended, lambda *_: torch.zeros(3), {}, "expected the shape (12, 32), got (3,)"),
        (checks.check_second_selection, second_selection, {}, "keeps the same 12 tokens as the model"),
        (checks.check_second_selection, second_selection, {"best_first": False}, "the right tokens in another order"),
        (checks.check_second_selection, lambda T_s1, *_: T_s1.scores[0].topk(12).indices, {}, "before the interaction"),
        (checks.check_second_selection, lambda *_: torch.arange(3), {}, "expected 12 rows, got the shape (3,)"),
        (checks.check_guided_tokens, guided_tokens, {}, "gives the model's 85 tokens"),
        (checks.check_guided_tokens, guided_tokens, {"ffn": False}, "the feed-forward block is missing"),
        (checks.check_guided_tokens, guided_tokens, {"residual": 1.0}, "is farthest from the model's"),
        (checks.check_guided_tokens, lambda *_: None, {}, "returns nothing yet"),
    )
    for check, function, changes, words in cases:
        changed = partial(function, **changes)
        changed.__name__ = "mine"
        result = check(changed, look, model.detector)
        printed = capsys.readouterr().out
        assert words in printed
        assert bool(result) == printed.startswith("✓")


def test_the_matching_cost_that_students_build_is_compared_with_the_models(shapes_data, tmp_path, capsys):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data))
    batch = collate([training_dataset(model.config)[0]])
    with torch.no_grad():
        stage = model.detector(ImageBatch.from_images(batch.images)).last

    def cost(logits, boxes, masks, labels, true_boxes, true_masks, giou, dice=5, l1=5):
        p, inside = logits.sigmoid()[:, labels], masks.sigmoid()
        c_class = -0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log()
        c_mask = functional.softplus(masks).mean(1, keepdim=True) - masks @ true_masks.T / masks.shape[1]
        c_dice = 1 - (2 * inside @ true_masks.T + 1) / (inside.sum(1, keepdim=True) + true_masks.sum(1) + 1)
        boxes = torch.cdist(boxes, true_boxes, p=1)
        return 4 * c_class + 5 * c_mask + dice * c_dice + l1 * boxes - 2 * giou

    objects = batch.targets.counts[0]
    cases = (
        (cost, f"gives the model's 12 × {objects} costs"),
        (partial(cost, dice=0), "everything but the dice cost is there"),
        (partial(cost, l1=10), "the l1 cost counts 2 times"),
        (lambda *given: cost(*given) + 1, "expected"),
        (lambda *given: cost(*given).T, "expected"),
        (lambda *_: None, "returns nothing yet"),
    )
    for seed in (0, 3):
        for function, words in cases:
            with checks.other_cases(seed):
                right = checks.check_matching_cost(function, stage, batch.targets, model.config.loss)
            printed = capsys.readouterr().out
            assert words in printed
            assert bool(right) == printed.startswith("✓")


def test_the_average_precision_that_students_build_is_compared_with_the_librarys(tmp_path, capsys):
    generate(tmp_path / "data", Shapes(train=1, val=8), processes=0)
    model = load("dimaskdino-shapes", device="cpu", overrides=[f"data.root={tmp_path / 'data'}"])
    data, found = CocoDataset(tmp_path / "data", "val"), detect_layers(model)
    truth = read_truth(data.annotations_file)

    def ap(images, thresholds=np.linspace(0.5, 0.95, 10), together=True):  # noqa: B008
        objects, values = sum(iou.shape[1] for iou, _ in images), []
        order = np.argsort(-np.concatenate([scores for _, scores in images]), kind="stable")
        for threshold in thresholds:
            right = []
            for iou, _ in images:
                free = set(range(iou.shape[1]))
                for row in iou.tolist():
                    best = max(free, key=row.__getitem__, default=None)
                    right.append(best is not None and row[best] >= threshold)
                    free -= {best} if right[-1] else set()
            hits = np.cumsum(np.array(right)[order] if together else right)
            precision, recall = hits / np.arange(1, len(right) + 1), hits / objects
            values.append(np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]))
        return 100 * np.mean(values)

    cases = (
        (ap, "at decoder.4"),
        (lambda images: ap(images) / 100, "AP is in percent"),
        (partial(ap, thresholds=[0.5]), "the threshold 0.5 alone"),
        (partial(ap, together=False), "first_selection: expected"),
        (lambda images: None, "returns nothing yet"),
    )
    for function, words in cases:
        right = checks.check_average_precision(function, found, truth, data, "disk")
        printed = capsys.readouterr().out
        assert words in printed
        assert bool(right) == printed.startswith("✓")


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
