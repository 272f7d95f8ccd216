"""Error analysis of a case worked out by hand, and the files that `evaluate --errors` writes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import trained_file

from dimaskdino.cli.models import evaluate
from dimaskdino.evaluation.coco_ap import Library, Truth
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.error_analysis import KINDS, confusion, save_analysis, tide_analysis, worst_images
from dimaskdino.modeling import Instances
from dimaskdino.utils.errors import UserError
from dimaskdino.viz import plot_confusion, plot_error_analysis

BOXES = {1: [(10, 10, 50, 50), (60, 60, 90, 90)], 2: [(10, 10, 50, 50)], 3: [(20, 20, 80, 80)]}


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Image 1 has a cat and a dog, image 2 a cat, image 3 a dog."""
    classes = {1: [1, 2], 2: [1], 3: [2]}
    annotations = []
    for image, boxes in BOXES.items():
        for (x0, y0, x1, y1), category in zip(boxes, classes[image], strict=True):
            outline = [x0, y0, x1, y0, x1, y1, x0, y1]
            entry = {"image_id": image, "category_id": category, "segmentation": [outline], "iscrowd": 0}
            width, height = x1 - x0, y1 - y0
            annotations.append(entry | {"bbox": [x0, y0, width, height], "area": width * height})
    images = [{"id": i, "height": 100, "width": 100} for i in BOXES]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return Truth({"images": images, "annotations": annotations, "categories": categories})


def detected(*rows: tuple[int, int, float, tuple[int, int, int, int]]) -> Detections:
    """Detections (image, label, score, box) whose masks fill their boxes."""
    by_image = {image: [row for row in rows if row[0] == image] for image in BOXES}
    parts = []
    for image, found in by_image.items():
        boxes = torch.tensor([row[3] for row in found], dtype=torch.float32).reshape(-1, 4)
        masks = torch.zeros(len(found), 100, 100, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        scores, labels = torch.tensor([row[2] for row in found]), torch.tensor([row[1] for row in found], dtype=int)
        parts.append(Detections.of(image, Instances(boxes, scores, labels, masks, torch.arange(len(found))), [1, 2]))
    return Detections.joined(parts)


CAT, DOG = 0, 1
RIGHT = [(i, label, 0.9, box) for i, labels in ((1, (CAT, DOG)), (2, (CAT,)), (3, (DOG,)))
         for label, box in zip(labels, BOXES[i], strict=True)]  # fmt: skip


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize(
    ("change", "extra", "expected"),
    [
        (None, None, {}),
        ((1, DOG, 0.9, (10, 10, 50, 50)), None, {"Cls": 1}),  # the cat of image 1 is called a dog
        ((1, CAT, 0.9, (10, 10, 50, 24)), None, {"Loc": 1}),  # IoU 0.35
        (None, (2, CAT, 0.5, (10, 10, 50, 49)), {"Dupe": 1}),
        (None, (3, CAT, 0.5, (0, 90, 9, 99)), {"Bkg": 1}),
        ((1, DOG, 0.0, (0, 90, 9, 99)), None, {"Bkg": 1, "Miss": 1}),
    ],
)
def test_each_kind_of_error(truth, kind, change, extra, expected):
    rows = ([change, *RIGHT[1:]] if change else RIGHT) + ([extra] if extra else [])
    found = tide_analysis(truth, detected(*rows), kind)
    assert {name: count for name, count in found.counts.items() if count} == expected
    if not expected:
        assert found.ap == pytest.approx(100)
        assert all(value == pytest.approx(0) for value in found.lost.values())
    elif set(expected) & {"Cls", "Loc", "Miss"}:
        assert found.ap < 100
        assert sum(found.lost[name] for name in expected) > 1


def test_the_confusion_of_classes_and_the_worst_images(truth):
    rows = [(1, DOG, 0.9, BOXES[1][0]), RIGHT[1], (2, CAT, 0.2, BOXES[2][0]), RIGHT[3], (3, CAT, 0.4, (0, 90, 9, 99))]
    found = confusion(truth, detected(*rows), "mask", threshold=0.3)
    assert found.classes == ["cat", "dog"]
    # one cat is a dog, the other, whose score is too low, is missed; both dogs are found; one cat is invented
    assert found.matrix.tolist() == [[0, 1, 1], [0, 2, 0], [1, 0, 0]]
    worst = worst_images(truth, detected(*rows), "mask", 0.3, 2)
    assert list(worst) == [2, 1]
    assert worst == {2: 0.0, 1: 0.5}


def test_without_hotcoco_one_line_says_what_is_missing(truth):
    other = Truth(truth.dataset, Library.load("pycocotools"))
    with pytest.raises(UserError, match="the error analysis needs hotcoco"):
        tide_analysis(other, detected(*RIGHT), "box")


def test_the_figures_and_the_record(truth, tmp_path):
    found = detected(*RIGHT[1:], (1, DOG, 0.9, BOXES[1][0]))
    stages = {
        name: {kind: tide_analysis(truth, found, kind) for kind in ("box", "mask")} for name in ("a", "decoder.2")
    }
    confused = confusion(truth, found, "box", 0.3)
    save_analysis(tmp_path / "errors.json", stages, confused)
    content = json.loads((tmp_path / "errors.json").read_text())
    assert content["stages"]["a"]["box"]["counts"]["Cls"] == 1
    assert content["confusion"]["matrix"] == confused.matrix.tolist()
    figure = plot_error_analysis(stages)
    assert [axes.get_title() for axes in figure.axes] == ["a", "layer 2"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(KINDS.values())
    axes = plot_confusion(confused).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "missed"]
    assert {text.get_text() for text in axes.texts} == {"50", "100"}


def test_a_confusion_of_many_classes_shows_the_most_confused(truth):
    matrix = np.diag(np.full(31, 10))
    matrix[7, 29] = matrix[29, 7] = 5
    names = [f"class {i}" for i in range(30)]
    confused = confusion(truth, detected(*RIGHT), "box", 0.3)
    axes = plot_confusion(type(confused)(names, matrix, 0.3)).axes[0]
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert len(shown) == 20
    assert {"class 7", "class 29"} <= set(shown)


def test_errors_need_masks(shapes_data, tmp_path):
    model = trained_file(tmp_path / "model.safetensors", shapes_data)
    with pytest.raises(UserError, match=r"--errors needs masks, which token_interaction\.0 does not predict"):
        evaluate((str(model),), stages=("token_interaction.0",), output=tmp_path / "out", errors=True, device="cpu")


def test_evaluate_writes_the_errors(shapes_data, tmp_path, capsys):
    model = trained_file(tmp_path / "model.safetensors", shapes_data)
    assert evaluate((str(model),), output=tmp_path / "out", errors=True, device="cpu") == 0
    assert "points of box AP50 that errors cost: wrong class" in capsys.readouterr().out
    stages = json.loads((tmp_path / "out" / "errors.json").read_text())["stages"]
    assert set(stages) == {"decoder.1", "decoder.2"}
    for name in ("errors.png", "confusion.png", "worst.png"):
        with Image.open(tmp_path / "out" / name) as figure:
            assert min(figure.size) > 300
