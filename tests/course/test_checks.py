"""Checks of the exercises: they tell right from wrong, and say what is wrong."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small import trained_file
from torch import nn
from torch.nn import functional
from torchvision.ops import box_iou

from dimaskdino import load
from dimaskdino.config import Shapes
from dimaskdino.course import checks
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import collate, training_dataset
from dimaskdino.data.shapes import generate
from dimaskdino.evaluation.coco_ap import read_truth
from dimaskdino.evaluation.layerwise_ap import detect_layers
from dimaskdino.inspection.objects import mask_iou
from dimaskdino.modeling import ImageBatch
from dimaskdino.modeling.layers import inverse_sigmoid, sine_boxes
from dimaskdino.studies.comparison import Comparison, Quantity, compare, holm
from dimaskdino.studies.report import StudyReport
from dimaskdino.studies.study import load_study
from dimaskdino.training.criterion import stage_losses
from dimaskdino.training.matcher import Matches, match

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


def told(result, words, capsys):
    """Whether what was printed has the words and the verdict; the picture is drawn."""
    printed = capsys.readouterr().out
    assert words in printed
    assert bool(result) == printed.startswith("✓")
    if result.picture is not None:
        assert not result
        assert result.picture._repr_png_()[0].startswith(b"\x89PNG")


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
        (checks.check_attended, attended, {}, "agrees with the package on all 12 queries"),
        (checks.check_attended, attended, {"unit": 1.0}, "they count in parts of the box"),
        (checks.check_attended, attended, {"over_all": False}, "all levels of a head share one"),
        (checks.check_attended, lambda *given: 2 * attended(*given), {}, "expected"),
        (checks.check_attended, lambda *_: torch.zeros(3), {}, "expected the shape (12, 32), got (3,)"),
        (checks.check_second_selection, second_selection, {}, "the 12 tokens that are kept, and their order"),
        (checks.check_second_selection, second_selection, {"best_first": False}, "the right tokens in another order"),
        (checks.check_second_selection, lambda T_s1, *_: T_s1.scores[0].topk(12).indices, {}, "before the interaction"),
        (checks.check_second_selection, lambda *_: torch.arange(3), {}, "expected 12 rows, got the shape (3,)"),
        (checks.check_guided_tokens, guided_tokens, {}, "all 85 feature tokens"),
        (checks.check_guided_tokens, guided_tokens, {"ffn": False}, "the feed-forward block is missing"),
        (checks.check_guided_tokens, guided_tokens, {"residual": 1.0}, "expected"),
        (checks.check_guided_tokens, lambda *_: None, {}, "returns nothing yet"),
    )
    for check, function, changes, words in cases:
        told(check(partial(function, **changes), look, model.detector), words, capsys)


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
        (cost, f"12 × {objects} costs"),
        (partial(cost, dice=0), "the dice cost is missing"),
        (partial(cost, l1=10), "the l1 cost counts 2 times"),
        (lambda *given: cost(*given) + 1, "expected"),
        (lambda *given: cost(*given).T, "expected"),
        (lambda *_: None, "returns nothing yet"),
    )
    for seed in (0, 3):
        for function, words in cases:
            with checks.other_cases(seed):
                told(checks.check_matching_cost(function, stage, batch.targets, model.config.loss), words, capsys)


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


def test_attention_with_heads_is_compared_with_a_layer(capsys):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    nn.init.normal_(layer.in_proj_bias)
    nn.init.normal_(layer.out_proj.bias)

    def attend(x, tokens, ask, key, value, out, heads, root=2.0, over=-1, mixed=True, better=0.0):
        q, k, v = (part.view(len(part), heads, -1).transpose(0, 1) for part in (ask(x), key(tokens), value(tokens)))
        weights = (q @ k.transpose(1, 2) / root).softmax(over) + better
        read = (weights @ v).transpose(0, 1).flatten(1)
        return (out(read) if mixed else read), weights

    for seed in (0, 3):
        with checks.other_cases(seed):
            for function, words in (
                (attend, "a layer with 4 heads"),
                (partial(attend, root=4.0), "divided by √C; each head has C / heads"),
                (partial(attend, root=1.0), "not divided by √(C / heads)"),
                (partial(attend, over=1), "softmax over the queries"),
                (partial(attend, mixed=False), "the last projection, `out`, is missing"),
                (partial(attend, better=0.1), "the weights: "),
                (lambda *given: (torch.zeros(6, 16), attend(*given)[1]), "the weights are right, the output is not"),
                (lambda *given: attend(*given)[0], "expected the output and the weights"),
                (lambda *given: None, "returns nothing yet"),
            ):
                told(checks.check_attend(function, layer), words, capsys)


def test_best_detections_are_compared_with_the_kits_at_each_stage(capsys):
    scenes = CocoDataset(ROOT / "notebooks" / "scenes", "val")
    model = load("dimaskdino-solids", device="cpu")

    def best(
        boxes, masks, labels, true_boxes, true_masks, true_labels, own=True, masks_count=1.0, apart=False, anyway=False
    ):
        box, mask = box_iou(boxes, true_boxes), mask_iou(masks, true_masks)
        allowed = (labels[:, None] == true_labels) | (not own)
        if apart:
            return tuple(x.where(allowed, 0.0).amax(0) for x in (box, mask))
        row = torch.where(allowed, box + masks_count * mask, -1.0).argmax(0, keepdim=True)
        return tuple(x.gather(0, row)[0].where(allowed.any(0) | anyway, 0.0) for x in (box, mask))

    looks = [model.inspect(scenes[i]) for i in range(len(scenes))]
    for function, words in (
        (best, "objects of 16 images at 6 stages"),
        (partial(best, own=False), "detections of other classes"),
        (partial(best, masks_count=0.0), "chosen by the box IoU alone"),
        (partial(best, apart=True), "those of two detections"),
        (partial(best, anyway=True), "both are 0 if no detection has the class"),
        (lambda *given: best(*given)[::-1], ": result 1: "),
        (lambda *given: torch.zeros(2), ": expected 2 results"),
        (lambda *given: ..., "returns nothing yet"),
    ):
        told(checks.check_best_detections(function, looks), words, capsys)


def test_training_steps_are_compared_with_the_packages(shapes_data, tmp_path, capsys):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data, "model.denoising.queries=20"))
    batch = collate([training_dataset(model.config)[0]])
    images, targets = ImageBatch.from_images(batch.images), batch.targets

    def step(
        detector, optimizer, images, targets, settings, clip_norm, denoising=True, groups=True, clip=True, fresh=True,
        move=True, divide=True,
    ):  # fmt: skip
        found = detector(images, targets)
        stages, M, G = list(found.stages.values()), targets.counts[0], found.denoising_groups
        pairs = list(zip(stages, match(stages, targets, settings), strict=True))
        known = Matches.from_lists([(np.arange(G * M), np.tile(np.arange(M), G))], targets.boxes.device)
        pairs += [(stage, known) for stage in found.denoising.values()]
        total = 0
        for (_, matches), sums in zip(pairs, stage_losses(pairs, targets, settings), strict=True):
            divisor = (M if divide else 1) * (G if matches is known and groups else 1)
            part = sum(getattr(settings.weights, term) * value for term, value in sums.items()) / divisor
            total = total + (part if denoising or matches is not known else 0 * part)
        if fresh:
            optimizer.zero_grad()
        total.backward()
        if clip:
            nn.utils.clip_grad_norm_(detector.parameters(), clip_norm)
        if move:
            optimizer.step()
        return total.item()

    before = {name: value.clone() for name, value in model.detector.state_dict().items()}
    for function, words in (
        (step, "every parameter after the step"),
        (partial(step, denoising=False), "the denoising queries have no loss"),
        (partial(step, groups=False), "not divided by the number of groups"),
        (partial(step, divide=False), "not divided by the number of objects"),
        (partial(step, clip=False), "not clipped"),
        (partial(step, fresh=False), "are the old gradients gone"),
        (partial(step, move=False), "optimizer.step() is missing"),
        (lambda *given: 2 * step(*given), "the loss: expected"),
        (lambda *given: None, "returns nothing yet"),
    ):
        told(checks.check_training_step(function, model.detector, images, targets, model.config), words, capsys)
    for name, value in model.detector.state_dict().items():
        assert torch.equal(value, before[name])  # students train copies


def test_verdicts_are_compared_with_the_kits_on_a_real_study(capsys):
    study = load_study(ROOT / "configs" / "ablations" / "table_4.yaml")
    report = StudyReport.of(study, "shapes", ROOT / "notebooks" / "studies" / "shapes")
    quantity = Quantity.parse("last.box")

    def verdicts(rows, adjust=holm, quantile=None, add=0.0):
        found = []
        for other in rows[1:]:
            test = stats.ttest_ind(other, rows[0], equal_var=False)
            interval = test.confidence_interval(0.95)
            error = (np.var(rows[0], ddof=1) / len(rows[0]) + np.var(other, ddof=1) / len(other)) ** 0.5
            mean = np.mean(other) - np.mean(rows[0])
            low, high = (mean - quantile * error, mean + quantile * error) if quantile else interval
            found.append((mean + add, low, high, test.pvalue))
        return [(*row[:3], p) for row, p in zip(found, adjust([row[3] for row in found]), strict=True)]

    for seed in (0, 2):
        with checks.other_cases(seed):
            for function, words in (
                (verdicts, "the intervals and p-values of"),
                (partial(verdicts, adjust=lambda p: p), "the p-values are not adjusted"),
                (partial(verdicts, adjust=lambda p: [min(1.0, len(p) * x) for x in p]), "(Bonferroni)"),
                (partial(verdicts, quantile=1.96), "low: expected"),
                (partial(verdicts, add=1.0), ": difference: expected"),
                (lambda rows: verdicts(rows)[:1], "expected 3 results"),
                (lambda rows: None, "returns nothing yet"),
            ):
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
    np.testing.assert_allclose(verdicts(values), by_kit, rtol=1e-9)


def test_a_module_behind_a_gate_is_compared_in_the_real_model(shapes_data, tmp_path, capsys):
    model = load(trained_file(tmp_path / "model.safetensors", shapes_data))
    look = model.inspect(CocoDataset(shapes_data, "val")[0])

    class Gated(nn.Module):
        def __init__(self, bato, gate, features=True, learned=True, always=False):
            super().__init__()
            self.bato, self.features, self.always = bato, features, always
            self.gate = nn.Parameter(torch.tensor(gate)) if learned else gate

        def forward(self, T_i, mask_features, guide, heads, need_weights):
            output = self.bato(T_i, mask_features, guide, heads, need_weights)
            gate = 1.0 if self.always else self.gate
            tokens = torch.lerp(T_i.tokens, output.T_bal.tokens, torch.as_tensor(gate))
            changed = replace(output, T_bal=T_i.with_tokens(tokens))
            mixed = mask_features + gate * (output.mask_features - mask_features)
            return replace(changed, mask_features=mixed) if self.features else changed

    class Unfinished(nn.Module):
        def __init__(self, bato, gate):
            super().__init__()

        def forward(self, *given): ...

    for module, words in (
        (Gated, "the model with an open gate"),
        (partial(Gated, features=False), "mask features: they are those of BATO"),
        (partial(Gated, always=True), "tokens: they are those of BATO"),
        (partial(Gated, learned=False), "no gradient reaches the gate"),
        (lambda bato, gate: 3, "expected a module, got int"),
        (Unfinished, "returns nothing yet"),
    ):
        told(checks.check_gated_module(module, look, model.detector), words, capsys)
    model.detector.bato = Gated(model.detector.bato, 0.5)  # as the chapter leaves it
    told(checks.check_gated_module(Gated, look, model.detector), "the model with an open gate", capsys)


def test_every_check_is_tested_here():
    tests = Path(__file__).read_text()
    named = [name for name in dir(checks) if name.startswith("check_")]
    assert len(named) > 25
    for name in named:
        assert f"checks.{name}" in tests, name
