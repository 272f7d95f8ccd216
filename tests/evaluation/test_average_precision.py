"""AP against pycocotools, and cases whose AP is known."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from crowded import crowded_truth, detections
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation import coco_ap
from dimaskdino.evaluation.coco_ap import (
    AveragePrecision,
    Library,
    Truth,
    average_precision,
    average_recall,
    best_library,
    match_classes,
    precision_curves,
    read_truth,
)
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP
from dimaskdino.modeling import CroppedMasks, Instances
from dimaskdino.utils.errors import UserError

LIBRARIES = [Library.load("hotcoco"), Library.load("pycocotools")]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_equal_to_pycocotools_to_the_last_digit(kind, library, tmp_path):
    file = crowded_truth(tmp_path)
    rows = detections(file).boxes if kind == "box" else detections(file).masks
    ours = Truth(json.loads(file.read_text()), library)
    found = average_precision(ours, rows, kind)
    curves = precision_curves(ours, rows, kind, 0.75)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        reference = COCOeval(truth, truth.loadRes(rows), {"box": "bbox", "mask": "segm"}[kind])
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert [found.AP, found.AP50, found.AP75, found.APs, found.APm, found.APl] == [100 * x for x in reference.stats[:6]]
    assert 5 < found.AP < 95
    for k, name in enumerate(["class 2", "class 5", "class 17"]):
        precision = reference.eval["precision"][:, :, k, 0, -1]
        assert found.per_class[name] == 100 * precision[precision > -1].mean()
    assert found.per_class["class 40"] is None
    assert (curves == reference.eval["precision"][5, :, :, 0, -1].T).all()
    with pytest.raises(ValueError, match=r"not 0\.77"):
        precision_curves(ours, rows, kind, 0.77)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_matches_and_recall_are_the_same_with_both_libraries(kind, tmp_path):
    file = crowded_truth(tmp_path)
    rows, content = detections(file).results(kind), json.loads(file.read_text())
    ours, reference = [Truth(content, library) for library in LIBRARIES]
    assert average_recall(ours, rows, kind) == average_recall(reference, rows, kind)
    assert average_precision(ours, [], kind) == average_precision(reference, [], kind)
    assert average_precision(ours, [], kind).AP == 0
    for matches, expected in zip(match_classes(ours, rows, kind), match_classes(reference, rows, kind), strict=True):
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(matches, name), values, err_msg=name)


@pytest.fixture
def library_chosen_anew():
    best_library.cache_clear()
    yield
    best_library.cache_clear()


def test_pycocotools_replaces_a_hotcoco_that_is_missing(library_chosen_anew, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert [best_library().name, best_library().name] == ["pycocotools", "pycocotools"]
    assert capsys.readouterr().err.count("since hotcoco cannot be used") == 1
    known = average_precision(Truth(coco_ap._KNOWN_TRUTH), coco_ap._KNOWN_BOXES, "box")
    assert pytest.approx(coco_ap._KNOWN_AP) == known.AP


def test_pycocotools_replaces_a_hotcoco_with_another_ap(library_chosen_anew, monkeypatch, capsys):
    assert best_library().name == "hotcoco"
    best_library.cache_clear()
    monkeypatch.setattr(coco_ap, "_KNOWN_AP", 50.0)
    assert best_library().name == "pycocotools"
    assert "its AP of a known case is 66.997, not 50.000" in capsys.readouterr().err


def test_the_truth_itself_scores_100(shapes_data):
    data = CocoDataset(shapes_data, "val")
    images = []
    for sample in data:
        n = len(sample.labels)
        found = Instances(
            sample.boxes, torch.ones(n), sample.labels, CroppedMasks.of(sample.masks.bool()), torch.arange(n)
        )
        images.append(Detections.of(sample.image_id, found, data.category_ids))
    results = Detections.joined(images)
    truth = read_truth(data.annotations_file)
    assert pytest.approx(100) == average_precision(truth, results.boxes, "box").AP
    assert pytest.approx(100) == average_precision(truth, results.masks, "mask").AP


def ap(value: float | None) -> AveragePrecision:
    return AveragePrecision(value, value, value, None, None, None, {"cup": value})


def test_layerwise_records_survive_a_round_trip(tmp_path):
    stages = {
        "first_selection": StageAP(ap(10.0), ap(14.5)),
        "token_interaction.0": StageAP(ap(11.0), None),
        "decoder.1": StageAP(ap(20.0), ap(19.0)),
        "decoder.2": StageAP(ap(None), ap(None)),
    }
    result = LayerwiseAP(stages, 7, "synthetic")
    result.save(tmp_path / "layers.json")
    assert LayerwiseAP.load(tmp_path / "layers.json") == result
    assert [s.imbalance for s in stages.values()] == [4.5, None, -1.0, None]
    assert "+4.5" in result.table()
    (tmp_path / "layers.json").write_text("{}")
    with pytest.raises(UserError, match="is not a layer-wise AP"):
        LayerwiseAP.load(tmp_path / "layers.json")
    with pytest.raises(UserError, match="run the evaluation first"):
        LayerwiseAP.load(tmp_path / "none.json")
