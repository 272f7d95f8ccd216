"""BDD100K's labels, both kinds, as COCO annotations: the same objects come out of both."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from dimaskdino.data.bdd100k import CLASSES, convert
from dimaskdino.data.coco import CocoDataset
from dimaskdino.utils.errors import UserError

H, W = 40, 60
CAR, SIGN = 3, 10  # categories from 1
OCCLUDED, CROWD, IGNORE = 4, 2, 1

#        category, attributes, instance, rows, columns
PARTS = [
    (CAR, OCCLUDED, 1, slice(0, 10), slice(0, 20)),
    (CAR, 0, 300, slice(20, 30), slice(5, 15)),  # its number needs both bytes
    (1, CROWD, 3, slice(30, 40), slice(30, 60)),
    (8, IGNORE, 4, slice(0, 5), slice(40, 50)),
    (SIGN, 0, 5, slice(12, 14), slice(50, 55)),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    images = tmp_path / "images" / "10k" / "val"
    images.mkdir(parents=True)
    Image.new("RGB", (W, H)).save(images / "a.jpg")
    return tmp_path


def bitmask(folder: Path) -> None:
    pixels = np.zeros((H, W, 4), np.uint8)
    for category, attributes, number, rows, columns in PARTS:
        pixels[rows, columns] = (category, attributes, number // 256, number % 256)
    target = folder / "labels" / "ins_seg" / "bitmasks" / "val"
    target.mkdir(parents=True)
    Image.fromarray(pixels, "RGBA").save(target / "a.png")


def run_lengths(folder: Path) -> None:
    labels = []
    for category, attributes, number, rows, columns in PARTS:
        mask = np.zeros((H, W), np.uint8)
        mask[rows, columns] = 1
        rle = coco_mask.encode(np.asfortranarray(mask))
        name = "traffic sign" if category == SIGN else CLASSES[category - 1]
        marks = {"crowd": bool(attributes & CROWD), "ignored": bool(attributes & IGNORE)}
        rle["counts"] = rle["counts"].decode()
        labels.append({"id": str(number), "category": name, "attributes": marks, "rle": rle})
    target = folder / "labels" / "ins_seg" / "rles"
    target.mkdir(parents=True)
    (target / "ins_seg_val.json").write_text(json.dumps({"frames": [{"name": "a.jpg", "labels": labels}]}))


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("labels", [bitmask, run_lengths])
def test_objects_crowds_and_what_has_no_mask(labels, folder):
    labels(folder)
    content = json.loads(convert(folder, "val").read_text())
    assert [c["name"] for c in content["categories"]] == list(CLASSES)
    found = {tuple(a["bbox"]): (a["category_id"], a["iscrowd"], a["area"]) for a in content["annotations"]}
    assert found == {
        (0, 0, 20, 10): (CAR, 0, 200),
        (5, 20, 10, 10): (CAR, 0, 100),
        (30, 30, 30, 10): (1, 1, 300),
        (40, 0, 10, 5): (8, 1, 50),
    }
    sample = CocoDataset(folder, "val")[0]
    assert sample.labels.tolist() == [CAR - 1, CAR - 1]
    wanted = torch.zeros(2, H, W, dtype=torch.uint8)
    wanted[0, :10, :20] = 1
    wanted[1, 20:30, 5:15] = 1
    assert {tuple(m.flatten().tolist()) for m in sample.masks} == {tuple(m.flatten().tolist()) for m in wanted}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_what_cannot_be_converted(folder):
    with pytest.raises(UserError, match="no labels: neither"):
        convert(folder, "val")
    with pytest.raises(UserError, match="10K Images"):
        convert(folder, "train")
    bitmask(folder)
    (folder / "images" / "10k" / "val" / "a.jpg").rename(folder / "images" / "10k" / "val" / "b.jpg")
    with pytest.raises(UserError, match=r"a\.jpg does not exist, but it has labels"):
        convert(folder, "val")
    Image.new("RGB", (W, H)).save(folder / "labels" / "ins_seg" / "bitmasks" / "val" / "a.png")
    with pytest.raises(UserError, match="not RGBA"):
        convert(folder, "val")
    assert not (folder / "annotations" / "instances_val.json").exists()
