"""Checks of the exercises: they tell right from wrong, and say what is wrong."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import trained_file
from torch import nn
from torchvision.ops import box_iou

from dimaskdino import load
from dimaskdino.config import Shapes
from dimaskdino.course import checks
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import collate, training_dataset
from dimaskdino.data.shapes import generate
from dimaskdino.evaluation.coco_ap import read_truth
from dimaskdino.evaluation.layerwise_ap import detect_layers
from dimaskdino.modeling import ImageBatch
from dimaskdino.studies.comparison import Comparison, Quantity, compare
from dimaskdino.studies.report import StudyReport
from dimaskdino.studies.study import load_study

ROOT = Path(__file__).parents[2]

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


def solution(chapter, name, old="", new=""):
    """A function or class of a chapter's source, with other code in place of the old one."""
    text = next((ROOT / "notebooks" / "source").glob(f"{chapter}_*.py")).read_text()
    if old:
        assert text.count(old) == 1
        text = text.replace(old, new)
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(text).body if isinstance(node, kept)]
    names = {}
    exec(compile(ast.Module(nodes, []), chapter, "exec"), names)
    return names[name]


def told(result, words, capsys):
    """Whether the printed text has the words and the verdict; the picture is drawn."""
    printed = capsys.readouterr().out
    assert words in printed
    assert bool(result) == printed.startswith("✓")
    if result.picture is not None:
        assert not result
        assert result.picture._repr_png_()[0].startswith(b"\x89PNG")


@pytest.fixture
def model(shapes_data, tmp_path):
    return load(trained_file(tmp_path / "model.safetensors", shapes_data, "model.denoising.queries=20"))


@pytest.fixture
def look(model, shapes_data):
    return model.inspect(CocoDataset(shapes_data, "val")[0])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "agrees with the package on all 12 queries"),
        ("offsets * unit", "offsets", "they count in parts of the box"),
        ("scores.flatten(2).softmax(-1).view(scores.shape)", "scores.softmax(-1)", "all levels of a head share one"),
        ("return total.permute", "return 2 * total.permute", "expected"),
        ("total.permute(2, 0, 1).flatten(1)", "total.flatten(1)", "expected the shape (12, 32), got"),
    ],
)
def test_deformable_attention(look, model, old, new, words, capsys):
    told(checks.check_attended(solution("03", "attended", old, new), look, model.detector), words, capsys)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "the 12 tokens that are kept, and their order"),
        ("dim=1).indices[0]", "dim=1).indices[0].flip(0)", "the right tokens in another order"),
        ("heads.label(block.norm(x))", "T_s1.scores[..., None]", "before the interaction"),
        ("dim=1).indices[0]", "dim=1).indices[0, :3]", "expected 12 rows, got the shape (3,)"),
    ],
)
def test_the_second_selection(look, model, old, new, words, capsys):
    told(
        checks.check_second_selection(solution("04", "second_selection", old, new), look, model.detector), words, capsys
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "all 85 feature tokens"),
        ("bato.ffn(attended)", "attended", "the feed-forward block is missing"),
        ("bato.ffn(attended)", "bato.ffn(attended) + 1", "expected"),
        ("return bato.ffn(attended)", "...", "returns nothing yet"),
    ],
)
def test_the_tokens_after_bato(look, model, old, new, words, capsys):
    result = checks.check_guided_tokens(solution("05", "guided_tokens", old, new), look, model.detector)
    assert (result.picture is not None) == (words in ("the feed-forward block is missing", "expected"))
    told(result, words, capsys)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "costs"),
        ("5 * c_dice", "0 * c_dice", "the dice cost is missing"),
        ("5 * torch.cdist", "10 * torch.cdist", "the l1 cost counts 2 times"),
        ("- 2 * giou", "- 2 * giou + 1", "expected"),
        ("- 2 * giou", "- 2 * giou[:1]", "expected"),
    ],
)
def test_the_matching_cost(model, old, new, words, capsys):
    batch = collate([training_dataset(model.config)[0]])
    with torch.no_grad():
        stage = model.detector(ImageBatch.from_images(batch.images)).last
    function = solution("06", "matching_cost", old, new)
    told(checks.check_matching_cost(function, stage, batch.targets, model.config.loss), words, capsys)


def test_average_precision(tmp_path, capsys):
    generate(tmp_path / "data", Shapes(train=1, val=8), processes=0)
    model = load("dimaskdino-shapes", device="cpu", overrides=[f"data.root={tmp_path / 'data'}"])
    data, found = CocoDataset(tmp_path / "data", "val"), detect_layers(model)
    truth = read_truth(data.annotations_file)
    for old, new, words in (
        ("", "", "at decoder.4"),
        ("100 * float(np.mean", "float(np.mean", "AP is in percent"),
        ("np.linspace(0.5, 0.95, 10)", "[0.5]", "the threshold 0.5 alone"),
        ("precision_recall(right[order], objects)", "precision_recall(right, objects)", "first_selection: expected"),
    ):
        function = solution("02", "average_precision", old, new)
        told(checks.check_average_precision(function, found, truth, data, "disk"), words, capsys)


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
    study = load_study(ROOT / "configs" / "ablations" / "table_7.yaml")
    assert checks.check_settings(lambda: ["model.selection.k=[80, 60, 40]"], "triple", study)
    for wrong, words in (
        (lambda: ["model.selection.k=[80, 40]"], "model.selection.k is (80, 40)"),
        (lambda: ["model.selektion.k=[80, 40]"], "did you mean"),
        (lambda: "model.selection.k=[80, 60, 40]", "expected a list of texts"),
        (lambda: ..., "returns nothing yet"),
    ):
        assert not checks.check_settings(wrong, "triple", study)
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "a layer with 4 heads"),
        ("/ q.shape[-1] ** 0.5", "/ x.shape[-1] ** 0.5", "divided by √C; each head has C / heads"),
        (" / q.shape[-1] ** 0.5", "", "not divided by √(C / heads)"),
        ("0.5).softmax(-1)\n    return out", "0.5).softmax(1)\n    return out", "softmax over the queries"),
        ("return out((weights", "return ((weights", "the last projection, `out`, is missing"),
        ("0.5).softmax(-1)\n    return out", "0.5).softmax(-1) + 0.1\n    return out", "the weights: at"),
        ("return out((weights", "return 2 * out((weights", "the weights are right, the output is not"),
        ("flatten(1)), weights\n", "flatten(1))\n", "expected the output and the weights"),
    ],
)
def test_attention_with_heads(old, new, words, capsys):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)
    told(checks.check_attend(solution("00", "attend", old, new), layer), words, capsys)


def test_best_detections(capsys):
    scenes = CocoDataset(ROOT / "notebooks" / "scenes", "val")
    model = load("dimaskdino-solids", device="cpu")
    looks = [model.inspect(scenes[i]) for i in range(6)]
    first = "[(float(box_iou(boxes[0], true_box)), float(mask_iou(masks[0], true_mask)))]"
    for old, new, words in (
        ("", "", "objects of 6 images at 6 stages"),
        ("if label == true_label:", "if True:", "detections of other classes"),
        ("max(pairs, key=sum)", "max(pairs)", "chosen by the box IoU alone"),
        ("max(pairs, key=sum)", "tuple(map(max, zip(*pairs)))", "those of two detections"),
        ("pairs = [(0.0, 0.0)]", f"pairs = [(0.0, 0.0)] if true_label in labels else {first}", "both are 0 if no"),
        ("torch.tensor(found).T.unbind()", "torch.tensor(found).T.unbind()[::-1]", ": result 1: "),
        ("torch.tensor(found).T.unbind()", "torch.tensor(found)[0]", ": expected 2 results"),
        ("torch.tensor(found).T.unbind()", "0.5", ": expected 2 results"),
    ):
        told(checks.check_best_detections(solution("01", "best_detections", old, new), looks), words, capsys)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "every parameter after the step"),
        ("M * groups if matches is known else M", "1e30 if matches is known else M", "denoising queries have no loss"),
        ("M * groups if matches is known else M", "M", "not divided by the number of groups"),
        ("M * groups if matches is known else M", "groups if matches is known else 1", "by the number of objects"),
        ("torch.nn.utils.clip_grad_norm_(detector.parameters(), clip_norm)", "...", "not clipped"),
        ("optimizer.zero_grad()", "...", "are the old gradients gone"),
        ("optimizer.step()", "...", "optimizer.step() is missing"),
        ("return total.item()", "return 2 * total.item()", "the loss: expected"),
    ],
)
def test_training_steps(model, old, new, words, capsys):
    batch = collate([training_dataset(model.config)[0]])
    images, detector = ImageBatch.from_images(batch.images), model.detector
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    function = solution("06", "training_step", old, new)
    told(checks.check_training_step(function, detector, images, batch.targets, model.config), words, capsys)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])  # students train copies


def test_verdicts_on_a_real_study(capsys):
    study = load_study(ROOT / "configs" / "ablations" / "table_4.yaml")
    report = StudyReport.of(study, "shapes", ROOT / "notebooks" / "studies" / "shapes")
    quantity = Quantity.parse("last.box")
    bonferroni = "adjusted[i] = min(1.0, len(found) * found[i][3])"
    for old, new, words in (
        ("", "", "the intervals and p-values of"),
        ("adjusted[i] = largest", "adjusted[i] = found[i][3]", "the p-values are not adjusted"),
        ("adjusted[i] = largest", bonferroni, "(Bonferroni)"),
        ("stats.t.ppf(0.975, df)", "1.96", "low: expected"),
        ("found.append((difference,", "found.append((difference + 1,", ": difference: expected"),
        (
            "for other in others:\n        difference",
            "for other in others[:1]:\n        difference",
            "expected 3 results",
        ),
    ):
        function = solution("07", "verdicts", old, new)
        told(checks.check_verdicts(function, report, quantity), words, capsys)
    # the statistics by hand are those of the kit's studies, over trainings
    bare = {
        row: {seed: replace(run, samples=None) for seed, run in runs.items()} for row, runs in report.measured.items()
    }
    comparisons = [Comparison(row.name, (row.name,), (study.variants[0].name,), quantity) for row in study.variants[1:]]
    by_kit = [
        (c.difference, c.joint.low, c.joint.high, c.adjusted_p) for c in compare(comparisons, bare, len(study.seeds))
    ]
    values = [list(report.values(row.name, quantity).values()) for row in study.variants]
    np.testing.assert_allclose(solution("07", "verdicts")(values), by_kit, rtol=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", "the model with an open gate"),
        ("gated(mask_features, output.mask_features, self.gate)", "output.mask_features", "mask features: they are"),
        ("gated(T_i.tokens, output.T_bal.tokens, self.gate)", "output.T_bal.tokens", "tokens: they are those of BATO"),
        ("nn.Parameter(torch.tensor(gate))", "gate", "no gradient reaches the gate"),
        ("return replace(output, T_bal", "return dict(T_bal", "forward returns dict"),
    ],
)
def test_a_module_behind_a_gate(look, model, old, new, words, capsys):
    told(checks.check_gated_module(solution("08", "GatedBATO", old, new), look, model.detector), words, capsys)
    told(checks.check_gated_module(lambda bato, gate: 3, look, model.detector), "expected a module, got int", capsys)


def test_a_gate_stays_in_the_model(look, model, capsys):
    gated = solution("08", "GatedBATO")
    model.detector.bato = gated(model.detector.bato, 0.5)  # as the chapter leaves it
    told(checks.check_gated_module(gated, look, model.detector), "the model with an open gate", capsys)
