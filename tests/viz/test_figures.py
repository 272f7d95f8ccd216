"""Figures show the numbers they are given."""

import io

import numpy as np
import pytest
import torch

from dimaskdino import config
from dimaskdino.evaluation.coco_ap import AveragePrecision
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP
from dimaskdino.inspection.diagnostics import GradientConflict, MatchedObjects, Survey
from dimaskdino.modeling import CroppedMasks, Instances
from dimaskdino.modeling.denoising import Denoising
from dimaskdino.modeling.structures import Targets
from dimaskdino.studies.comparison import Comparison, ComparisonResult, Interval, Quantity
from dimaskdino.studies.report import StudyReport
from dimaskdino.studies.runs import EvaluatedRun
from dimaskdino.studies.study import Study, Variant
from dimaskdino.training.criterion import LOSS_TERMS
from dimaskdino.viz import (
    draw_denoising,
    draw_instances,
    draw_matching,
    draw_stages,
    plot_ablation,
    plot_differences,
    plot_first_and_last_layer,
    plot_gradient_conflict,
    plot_guidance_rank,
    plot_imbalance_by_group,
    plot_layerwise_ap,
    plot_loss_terms,
    plot_losses,
    plot_matched_queries,
    plot_precision_recall,
    plot_selection_recall,
    plot_study_layers,
)
from dimaskdino.viz.style import free_place


def ap(value: float) -> AveragePrecision:
    return AveragePrecision(value, value, value, None, None, None, {})


RESULT = LayerwiseAP(
    {
        "first_selection": StageAP(ap(10.0), ap(20.0)),
        "token_interaction.0": StageAP(ap(15.0), None),
        "decoder.0": StageAP(ap(16.0), ap(21.0)),
        "decoder.1": StageAP(ap(30.0), ap(28.0)),
    },
    4,
    "synthetic",
)


def test_layerwise_curves_hold_every_value_at_its_stage():
    top, bottom = plot_layerwise_ap({"a": RESULT}).axes
    box, mask = top.lines
    assert (list(box.get_xdata()), list(box.get_ydata())) == ([0, 1, 2, 3], [10, 15, 16, 30])
    # a gap at the stage without masks
    assert list(mask.get_xdata()) == [0, 1, 2, 3]
    np.testing.assert_array_equal(mask.get_ydata(), [20, np.nan, 21, 28])
    assert [bar.get_height() for bar in bottom.patches] == [10, 5, -2]
    assert [t.get_text() for t in bottom.get_xticklabels()] == [
        *("first\nselection", "token\ninter. 1", "decoder\ninput", "layer 1")
    ]
    assert "10.0" in [text.get_text() for text in top.texts]


def test_two_runs_of_different_depth_share_the_axis():
    shallow = LayerwiseAP({"first_selection": StageAP(ap(1), ap(2)), "decoder.1": StageAP(ap(3), ap(4))}, 4, "")
    top, _ = plot_layerwise_ap({"a": RESULT, "b": shallow}).axes
    assert list(top.lines[2].get_xdata()) == [0, 3]
    assert {text.get_text() for text in top.get_legend().get_texts()} == {"a: box", "a: mask", "b: box", "b: mask"}


def test_loss_curves():
    losses = {f"decoder.{i}/{t}": 1.0 + i for i in (1, 2) for t in LOSS_TERMS}
    records = [{"step": s, "loss": 9.0 / s, "losses": losses} for s in (1, 2, 3)] + [{"step": 3, "skipped": "x"}]
    left, right = plot_losses({"a": records, "empty": []}).axes
    assert list(left.lines[0].get_ydata()) == [9.0, 4.5, 3.0]
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(LOSS_TERMS)
    assert all(set(line.get_ydata()) == {3.0} for line in right.lines)  # of the last layer


def test_loss_terms_of_ones_own_have_a_curve():
    """A run that began without the term, and one with other terms alone: a colour is that of one term in all runs."""
    records = [{"step": s, "loss": 2.0, "losses": {"decoder.1/l1": 1.0}} for s in range(120)]
    records[-1]["losses"]["decoder.1/area"] = 0.5
    other = [{"step": 1, "loss": 2.0, "losses": {"decoder.1/area": 0.25}}]
    right = plot_losses({"a": records, "b": other}).axes[1]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["l1", "area"]
    l1, area, second = right.lines
    assert (len(l1.get_xdata()), list(area.get_xdata()), list(area.get_ydata())) == (119, [119], [0.5])
    assert l1.get_color() != area.get_color() == second.get_color()


def test_long_runs_are_shown_as_running_means():
    losses = dict.fromkeys((f"decoder.1/{t}" for t in LOSS_TERMS), 1.0)
    records = [{"step": s, "loss": 1.0 + s % 2, "losses": losses} for s in range(120)]
    raw, mean = plot_losses({"a": records}).axes[0].lines
    assert list(raw.get_ydata()) == [1.0, 2.0] * 60
    assert list(mean.get_ydata()) == [1.5] * 119
    assert list(mean.get_xdata()) == [s + 0.5 for s in range(119)]


def test_instances_above_the_threshold_are_drawn():
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[0, 5:10, 5:10] = True
    boxes = torch.tensor([[5.0, 5, 10, 10], [0, 0, 3, 3]])
    found = Instances(
        boxes, torch.tensor([0.9, 0.1]), torch.tensor([1, 0]), CroppedMasks.of(masks), torch.tensor([0, 1])
    )
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    axes = draw_instances(image, found, ["cup", "key"], threshold=0.5).axes[0]
    assert [text.get_text() for text in axes.texts] == ["key 0.90"]
    shown = axes.images[0].get_array()
    assert (shown.sum(-1) > 0).sum() == 25  # the mask, and nothing else, is coloured
    figure = draw_stages(image, {"decoder.0": found, "decoder.1": found}, ["cup", "key"])
    assert [a.get_title() for a in figure.axes] == ["decoder input", "layer 1"]
    picture, metadata = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert metadata == {"alt": "Figure: decoder input; layer 1"}


@pytest.mark.parametrize("name", ["$", "a_b^c", "cup $5 and $6", "$\\undefined{", "x" * 10_000, "a\nb\nc"])
def test_any_name_can_be_drawn(name):
    """The name of a class or run is shortened if it is long, and never read as a formula."""
    boxes = torch.tensor([[2.0, 2, 20, 20]])
    instances = Instances(boxes, torch.tensor([0.9]), torch.tensor([0]), None, torch.tensor([0]))
    figure = draw_instances(torch.zeros(3, 40, 40, dtype=torch.uint8), instances, [name])
    record = {"step": 1, "loss": 2.0, "losses": dict.fromkeys((f"decoder.1/{term}" for term in LOSS_TERMS), 1.0)}
    for each in (figure, plot_losses({name: [record]}), plot_layerwise_ap({name: RESULT, "other": RESULT})):
        each.savefig(io.BytesIO(), format="png", dpi=40)
    shown = figure.axes[0].texts[0].get_text()
    assert shown.startswith(" ".join(name.split())[:30])
    assert len(shown) < 50


def test_matching_frames_each_pair_in_its_cell():
    cost = torch.tensor([[5.0, 1.0], [2.0, 7.0], [9.0, 9.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 3)
    figure = draw_matching(torch.zeros(3, 20, 30, dtype=torch.uint8), boxes[:2], boxes, cost, [(1, 0), (0, 1)])
    image, table, _ = figure.axes
    assert [len(drawn.get_paths()) for drawn in image.collections] == [2, 2]  # objects and queries
    shown = [int(label.get_text()) for label in table.get_xticklabels()]
    assert shown == [1, 0, 2]
    frames = table.collections[0].get_paths()[::-1]  # the first is drawn last
    for frame, (query, number) in zip(frames, [(1, 0), (0, 1)], strict=True):
        column, row = (round(value + 0.5) for value in frame.vertices.min(0))
        assert (shown[column], row) == (query, number)
        assert float(table.images[0].get_array()[row, column]) == cost[query, number]


def test_bars_of_the_losses_add_up():
    losses = {"decoder.0/label": 1.0, "decoder.0/l1": 2.0, "token_interaction.0/label": 4.0}
    losses |= {"denoising.decoder.0/dice": 3.0, "decoder.0/area": 0.5}
    axes = plot_loss_terms(losses).axes[0]
    labels = ["decoder input", "token inter. 1", "denoising: decoder input"]
    assert [t.get_text() for t in axes.get_yticklabels()] == labels
    ends = {}
    for bar in axes.patches:
        row = round(bar.get_y() + 0.4)
        ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    assert ends == {0: 3.5, 1: 4.0, 2: 3.0}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["label", "l1", "dice", "area"]


def test_denoising_groups_and_their_mask():
    targets = Targets(
        torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2, 4), 0.4), torch.ones(1, 2, 8, 8).byte(), (2,)
    )
    model = config.Model(classes=3, hidden_dim=32, denoising=config.Denoising(queries=8))
    denoising = Denoising(model)(targets, matching=5)
    *groups, mask = draw_denoising(torch.zeros(3, 8, 8, dtype=torch.uint8), targets.boxes[0], denoising, 2).axes
    assert [axes.get_title() for axes in groups] == ["group 1 of 4", "group 2 of 4", "group 3 of 4"]
    assert all(len(drawn.get_paths()) == 2 for axes in groups for drawn in axes.collections)
    assert mask.images[0].get_array().shape == (13, 13)


def test_precision_recall_says_the_area():
    curves = {"box, IoU ≥ 0.5": np.linspace(1, 0, 101), "mask, IoU ≥ 0.5": np.ones(101)}
    curves["box, IoU ≥ 0.9"] = np.zeros(101)
    axes = plot_precision_recall(curves, "disk").axes[0]
    areas = [text.get_text().split(": ")[1] for text in axes.get_legend().get_texts()]
    assert areas == ["AP 50.0", "AP 100.0", "AP 0.0"]
    assert axes.lines[0].get_color() == axes.lines[2].get_color() != axes.lines[1].get_color()
    assert axes.lines[0].get_linestyle() == axes.lines[1].get_linestyle() != axes.lines[2].get_linestyle()


def report(variants, published=None, **results):
    """A report of some variants with the layer-wise APs of their runs, by label."""
    named, measured = [], {}
    for label, runs in variants.items():
        named.append(Variant(name=label.replace(", ", "_"), label=label))
        if runs:
            measured[named[-1].name] = {seed: EvaluatedRun(result) for seed, result in enumerate(runs)}
    study = Study.model_construct(title="Study", variants=tuple(named))
    made = StudyReport(study, "shapes", measured, published or {})
    vars(made).update(results)
    return made


def test_ablation_marks_runs_and_their_mean():
    first, second = (LayerwiseAP({"decoder.1": StageAP(ap(x), ap(x + 2))}, 4, "") for x in (10.0, 14.0))
    published = {"COCO": {"A": {"last.box": 30.0, "last.mask": 20.0}, "B": {"last.box": 31.0, "last.mask": 21.0}}}
    coco, shapes = plot_ablation(report({"A": [first, second], "B": []}, published=published)).axes
    assert [list(line.get_xdata()) for line in coco.lines if len(line.get_xdata())] == [[30.0], [31.0], [20.0], [21.0]]
    data = [list(line.get_xdata()) for line in shapes.lines if len(line.get_xdata())]
    assert data == [[10.0, 14.0], [12.0, 12.0], [12.0, 16.0], [14.0, 14.0]]
    assert [label.get_text() for label in coco.get_yticklabels()] == ["A", "B"]
    assert plot_ablation(report({"A": []})).axes[0].get_xlabel() == "nothing measured"


def test_study_layers_show_means_and_deviations():
    other = LayerwiseAP(RESULT.stages | {"decoder.1": StageAP(ap(34.0), ap(30.0))}, 4, "")
    figure = plot_study_layers(report({"A": [RESULT, other], "B": [RESULT], "C": []}))
    box, mask, imbalance = figure.axes
    assert list(box.lines[0].get_ydata()) == [10, 15, 16, 32]
    assert list(mask.lines[0].get_ydata()) == [20, 21, 29]
    assert list(imbalance.lines[0].get_ydata()) == [10, 5, -3]
    assert list(imbalance.lines[1].get_ydata()) == [10, 5, -2]
    heights = box.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose([heights.min(), heights.max()], [10, 32 + 8**0.5]).all()  # (30, 34): deviation √8
    assert {text.get_text() for text in imbalance.texts} == {"A (2 runs)", "B (1 run)"}
    assert box.get_ylim() == mask.get_ylim()


def test_variants_of_two_factors_have_a_colour_and_a_line_style():
    names = [f"{module}, {formula}" for formula in ("x", "y", "z, old") for module in ("A", "B", "C")]
    box, _, imbalance = plot_study_layers(report({name: [RESULT] for name in names})).axes
    colours = [line.get_color() for line in box.lines]
    assert colours[:3] * 3 == colours
    assert len(set(colours)) == 3
    assert [line.get_linestyle() for line in box.lines] == ["-"] * 3 + ["--"] * 3 + [":"] * 3
    assert not box.collections  # no bands
    places = sorted(text.get_position()[1] for text in imbalance.texts)
    assert min(np.diff(places)) > 0

    others = plot_study_layers(report({"A, x": [RESULT], "B": [RESULT], "C": [RESULT]})).axes[0]
    assert len({line.get_color() for line in others.lines}) == 3
    assert len(others.collections) == 3


def test_differences_show_intervals_and_published():
    def comparison(label, plus, quantity, difference, images=None, joint=None):
        comparison = Comparison(label, (plus,), ("a",), Quantity.parse(quantity))
        return ComparisonResult(comparison, {"a": 2, plus: 2}, difference, over_images=images, joint=joint)

    found = comparison("b − a", "b", "last.box", 3.0, Interval(1.0, 5.0), Interval(-9.0, 15.0))
    single = comparison("c − a", "c", "last.box", -1.0)
    results = [found, single, comparison("c − a", "c", "first.imbalance", -1.0)]
    published = {"COCO": {"a": {"last.box": 30.0}, "b": {"last.box": 30.8}}}
    box, imbalance = plot_differences(report({}, published=published, results=results)).axes
    drawn = [list(line.get_xdata()) for line in box.lines if len(line.get_xdata())]
    assert drawn == [[-9, 15], [1, 5], [3], [0.8], [-1], [0, 0]]
    assert {line.get_solid_capstyle() for line in box.lines[:2]} == {"butt"}  # other caps would lengthen intervals
    assert [list(line.get_xdata()) for line in imbalance.lines] == [[-1], [0, 0]]
    assert [label.get_text() for label in box.get_yticklabels()] == ["b − a", "c − a"]
    assert box.get_xlim() == imbalance.get_xlim()
    four = [f"decoder.{i}.box" for i in range(4)]
    results = [comparison("c − a", "c", text, 1.0) for text in four]
    drawn = plot_differences(report({}, results=results)).axes
    assert [axes.get_title() for axes in drawn] == [Quantity.parse(text).label for text in four]
    assert [label.get_text() for label in drawn[3].get_yticklabels()] == ["c − a"]  # the fourth lies below


def survey(stages, query, box, mask, recall, rank, conflict):
    matched = MatchedObjects(stages, torch.tensor(query), torch.tensor(box), torch.tensor(mask))
    kept = {name: torch.tensor(values) for name, values in recall.items()}
    return Survey(matched, kept, torch.tensor(rank), conflict)


DI = survey(
    ("decoder.0", "decoder.1"),
    [[1, 2], [1, 3]],
    [[0.5, 0.7], [0.8, 1.0]],
    [[0.9, 0.9], [1.0, 1.0]],
    {"T_i": [True, True], "T_s1": [True, True], "T_s2": [True, False]},
    [2.0, 4.0],
    {"decoder": [GradientConflict(2.0, 1.0, -0.5), GradientConflict(4.0, 1.0, 0.1)]},
)
PLAIN = survey(
    ("first_selection", "decoder.0", "decoder.1"),
    [[0, 0], [1, 2], [1, 2]],
    [[0.1, 0.1], [0.2, 0.2], [0.3, 0.5]],
    [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]],
    {"T_i": [True, True], "T_s1": [False, False]},
    [],
    {},
)


def test_matched_queries_and_their_stability():
    left, right = plot_matched_queries({"DI": DI, "plain": PLAIN}).axes
    assert [list(line.get_xdata()) for line in left.lines] == [[1, 2], [1, 2], [0, 1, 2], [0, 1, 2]]
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.6, 0.9])
    np.testing.assert_allclose(left.lines[2].get_ydata(), [0.1, 0.2, 0.4])
    assert [list(line.get_ydata()) for line in right.lines] == [[0.5], [1.0]]
    assert [t.get_text() for t in right.get_xticklabels()] == ["input → 1"]


def test_selection_recall_and_guidance_rank():
    bars = plot_selection_recall({"DI": DI, "plain": PLAIN}).axes[0].patches
    assert [bar.get_height() for bar in bars] == [1, 1, 0.5, 1, 0]
    rank = plot_guidance_rank({"DI": DI, "plain": PLAIN}, 10).axes[0]
    assert [text.get_text() for text in rank.get_legend().get_texts()] == ["DI: mean 3.0 of 10"]


def test_gradient_conflict_bars():
    left, right = plot_gradient_conflict({"DI": DI.conflict}).axes
    assert [bar.get_height() for bar in left.patches] == [3]
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], [-0.2])


def test_imbalance_by_group():
    groups = {"small": {"decoder.0": 5.0, "decoder.1": 1.0}, "large": {"decoder.1": -1.0}}
    axes = plot_imbalance_by_group({"DI": groups}, "title").axes[0]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]]
    assert lines == [([0, 1], [5, 1]), ([1], [-1])]


def test_slopes_hold_the_values_and_the_imbalance():
    layers = {"first": {"box": 16.6, "mask": 21.1}, "last": {"box": 28.1, "mask": 25.3}}
    figure = plot_first_and_last_layer({"Paper": {"A": layers, "B": layers}, "Here": {"A": layers}})
    assert [axes.get_title() for axes in figure.axes] == ["A", "B", "A"]
    mask, box, imbalance = figure.axes[0].lines
    assert list(mask.get_ydata()) == [21.1, 25.3]
    assert list(box.get_ydata()) == [16.6, 28.1]
    assert list(imbalance.get_ydata()) == [16.6, 21.1]
    assert imbalance.get_solid_capstyle() == "butt"  # a round cap would lengthen the bar
    assert {text.get_text() for text in figure.axes[0].texts} == {"21.1", "25.3", "16.6", "28.1", "imbalance\n+4.5"}


def test_labels_of_objects_do_not_overlap():
    rng = np.random.default_rng(0)
    taken = []
    for _ in range(12):
        x, y = rng.uniform(0, 80, 2)
        place = free_place((x, y, x + 30, y + 30), (25, 6), (128, 128), taken)
        taken.append((*place, place[0] + 25, place[1] + 6))
    for i, (a, b, c, d) in enumerate(taken):
        assert a >= 0
        assert c <= 128
        for e, f, g, h in taken[:i]:
            assert c <= e or a >= g or d <= f or b >= h
