"""AP against pycocotools, and cases whose AP is known."""

import contextlib
import io

import pytest
import torch
from crowded import crowded_truth, detections
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dimaskdino.data.coco import CocoDataset
from dimaskdino.evaluation.coco_ap import (
    AveragePrecision,
    average_precision,
    precision_curves,
    read_truth,
)
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP, StageAP
from dimaskdino.modeling import Instances
from dimaskdino.utils.errors import UserError


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_equal_to_pycocotools_to_the_last_digit(kind, tmp_path):
    file = crowded_truth(tmp_path)
    found = detections(file)
    rows = found.boxes if kind == "box" else found.masks
    ours = average_precision(read_truth(file), rows, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        reference = COCOeval(truth, truth.loadRes(rows), {"box": "bbox", "mask": "segm"}[kind])
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    values = [ours.AP, ours.AP50, ours.AP75, ours.APs, ours.APm, ours.APl]
    assert values == [100 * x for x in reference.stats[:6]]
    assert 5 < ours.AP < 95
    for k, name in enumerate(["class 2", "class 5", "class 17"]):
        precision = reference.eval["precision"][:, :, k, 0, -1]
        assert ours.per_class[name] == 100 * precision[precision > -1].mean()
    assert ours.per_class["class 40"] is None
    curves = precision_curves(read_truth(file), rows, kind, 0.75)
    assert (curves == reference.eval["precision"][5, :, :, 0, -1].T).all()
    with pytest.raises(ValueError, match=r"not 0\.77"):
        precision_curves(read_truth(file), rows, kind, 0.77)


def test_the_truth_itself_scores_100(shapes_data):
    data = CocoDataset(shapes_data, "val")
    images = []
    for sample in data:
        n = len(sample.labels)
        corners = [(m.nonzero()[:, [1, 0]].amin(0), m.nonzero()[:, [1, 0]].amax(0) + 1) for m in sample.masks]
        boxes = torch.stack([torch.cat(c) for c in corners]).float()
        found = Instances(boxes, torch.ones(n), sample.labels, sample.masks.bool(), torch.arange(n))
        images.append(Detections.of(sample.image_id, found, data.category_ids))
    results = Detections.joined(images)
    truth = read_truth(data.annotations_file)
    assert pytest.approx(100) == average_precision(truth, results.boxes, "box").AP
    assert pytest.approx(100) == average_precision(truth, results.masks, "mask").AP


def test_no_detections_at_all(tmp_path):
    assert average_precision(read_truth(crowded_truth(tmp_path)), [], "box").AP == 0


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
