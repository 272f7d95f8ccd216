"""A dataset with crowds, ties among the scores, wrong classes and false alarms, and detections for it."""

import json
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask

from dimaskdino.evaluation.detections import Detections
from dimaskdino.modeling import CroppedMasks, Instances


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
        masks_of_queries = CroppedMasks.of(torch.from_numpy(stacked).bool())
        instances = Instances(
            xyxy.float(), scores.float(), torch.tensor(found), masks_of_queries, torch.arange(len(masks))
        )
        results.append(Detections.of(image["id"], instances, [2, 5, 17, 40]))
    return Detections.joined(results)
