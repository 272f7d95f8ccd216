"""AP against pycocotools, and cases whose AP is known."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dimaskdino.data.coco import CocoDataset
from dimaskdino.errors import UserError
from dimaskdino.evaluation.coco_ap import (
    AveragePrecision,
    average_precision,
    precision_curves,
    read_truth,
)
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layers import LayerwiseAP, StageAP
from dimaskdino.modeling import Instances


def crowded_truth(folder: Path) -> Path:
    """30 images with random rectangles of all sizes, some of them crowds, category ids with gaps, one unused."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(30):
        images.append({"id": 10 * image, "file_name": f"{image}.jpg", "height": 200, "width": 240})
        for _ in range(int(rng.integers(0, 9))):
            mask = rectangle(rng)
            encoded = coco_mask.encode(np.asfortranarray(mask))
            box = coco_mask.toBbox(encoded).tolist()
            encoded["counts"] = encoded["counts"].decode()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 * image,
                    "category_id": int(rng.choice([2, 5, 17])),
                    "segmentation": encoded,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    categories = [{"id": i, "name": f"class {i}"} for i in (2, 5, 17, 40)]
    file = folder / "truth.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def rectangle(rng: np.random.Generator) -> np.ndarray:
    mask = np.zeros((200, 240), np.uint8)
    h, w = rng.integers(5, 150, 2)
    y, x = rng.integers(0, 200 - h), rng.integers(0, 240 - w)
    mask[y : y + h, x : x + w] = 1
    return mask


def detections(file: Path) -> Detections:
    """The truth, moved a little, some of it of the wrong class, and false alarms, with ties among the scores."""
    rng = np.random.default_rng(1)
    content = json.loads(file.read_text())
    results = []
    labels = {2: 0, 5: 1, 17: 2, 40: 3}
    for image in content["images"]:
        masks, found = [], []
        for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            masks.append(np.roll(coco_mask.decode(a["segmentation"]), rng.integers(-9, 10, 2), (0, 1)))
            found.append(labels[a["category_id"]] if rng.random() < 0.8 else int(rng.integers(4)))
        for _ in range(int(rng.integers(0, 5))):
            masks.append(rectangle(rng))
            found.append(int(rng.integers(4)))
        if not masks:
            continue
        stacked = np.stack(masks)
        xywh = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(stacked.transpose(1, 2, 0))))
        xyxy = torch.tensor(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)) + torch.rand(len(masks), 4)
        scores = torch.tensor(rng.random(len(masks)).round(1))
        masks_of_queries = torch.from_numpy(stacked).bool()
        instances = Instances(
            xyxy.float(), scores.float(), torch.tensor(found), masks_of_queries, torch.arange(len(masks))
        )
        results.append(Detections.of(image["id"], instances, [2, 5, 17, 40]))
    return Detections.joined(results)


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
    result = LayerwiseAP(stages, 7, "made up")
    result.save(tmp_path / "layers.json")
    assert LayerwiseAP.load(tmp_path / "layers.json") == result
    assert [s.imbalance for s in stages.values()] == [4.5, None, -1.0, None]
    assert "+4.5" in result.table()
    (tmp_path / "layers.json").write_text("{}")
    with pytest.raises(UserError, match="is not a layer-wise AP"):
        LayerwiseAP.load(tmp_path / "layers.json")
    with pytest.raises(UserError, match="run the evaluation first"):
        LayerwiseAP.load(tmp_path / "none.json")
