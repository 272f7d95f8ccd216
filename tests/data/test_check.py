"""The check of a dataset: each of its points, on data with and without the fault."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_coco import SQUARE
from test_coco import dataset as small_dataset

from dimaskdino.cli.data import check as check_command
from dimaskdino.config import Config, parse_config
from dimaskdino.data.annotations import inspect_annotations
from dimaskdino.data.check import advice, check_dataset, describe, grouped
from dimaskdino.data.coco import CocoDataset, find_split, find_splits
from dimaskdino.utils.errors import UserError

SIDE = 80


def settings(*changes: str) -> Config:
    base = ["data.resize.shortest=80", "data.resize.longest=80", "model.selection.k=[8,4]", "evaluation.detections=3"]
    return parse_config({}, [*base, *changes], "test")


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def dataset(root: Path, splits: dict[str, list[list[list[float]]]], classes: int = 1, **fields: object) -> Path:
    """A folder with an image per list of outlines."""
    for split, images in splits.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)]
        for n, outlines in enumerate(images, start=1):
            seed = sum(map(ord, split)) + 100 * n
            coarse = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE)).save(root / "images" / split / f"{n}.png")
            content["images"].append({"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE})
            for outline in outlines:
                xs, ys = outline[::2], outline[1::2]
                box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
                number = len(content["annotations"]) + 1
                record = {"id": number, "image_id": n, "category_id": 1, "segmentation": [outline], "bbox": box}
                content["annotations"].append(record | {"area": box[2] * box[3] / 2} | fields)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def advice_on(root: Path, *changes: str) -> str:
    file, folder = find_split(root, "train")
    annotations = inspect_annotations(file)
    return "\n".join(advice(annotations, describe(annotations, folder), settings(*changes)))


def test_objects_that_vanish_at_the_image_size(tmp_path):
    root = dataset(tmp_path, {"train": [[square(10, 10, 30), square(50, 50, 8)]] * 3})
    assert "cover less" not in advice_on(root)
    # enlarged by 1/2 the small ones, of half their box's area as recorded, have 32 / 4 < 16 pixels
    told = advice_on(root, "data.resize.shortest=40", "data.resize.longest=40")
    assert "3 of 6 objects (50.0%) cover less than 4x4 pixels" in told
    assert "shortest side 40, longest 40" in told


def test_crowded_images(tmp_path):
    five = [square(12 * i, 5, 10) for i in range(5)]
    root = dataset(tmp_path, {"train": [five, five[:4], five[:3]]})
    told = advice_on(root)
    assert "1 image has more than the 4 objects that model.selection.k allows, at most 5" in told
    assert "2 images have more than the 3 objects that evaluation.detections allows, at most 5" in told
    assert "more than" not in advice_on(root, "model.selection.k=[8,5]", "evaluation.detections=5")


def test_areas_that_are_those_of_the_boxes(tmp_path):
    images = [[square(10, 10, 30)]] * 3
    assert "areas" not in advice_on(dataset(tmp_path / "a", {"train": images}))
    assert "3 areas are those of the boxes" in advice_on(dataset(tmp_path / "b", {"train": images}, area=900))


def test_classes_without_or_with_few_objects(tmp_path):
    root = dataset(tmp_path, {"train": [[square(10, 10, 30)]] * 3}, classes=15)
    told = advice_on(root)
    assert "without a single object: class 2, class 3" in told
    assert "and 4 more" in told
    assert "with fewer than 10 objects: class 1" in told
    file, folder = find_split(root, "train")
    text = describe(inspect_annotations(file), folder).text()
    assert text.count("class ") == 10
    assert "5 more classes" in text


def test_relative_sizes(tmp_path):
    root = dataset(tmp_path, {"train": [[square(10, 10, 40)]] * 3})
    file, folder = find_split(root, "train")
    found = describe(inspect_annotations(file), folder)
    assert found.relative_sizes == pytest.approx((0.5**1.5,) * 3)  # √(800 / 6400)


def test_photographs_in_two_splits(tmp_path):
    images = [[square(10, 10, 30)]] * 4
    root = dataset(tmp_path, {"train": images, "val": images})
    assert not any(report.advice and "photograph" in report.advice[-1] for report in check(root))
    (root / "images" / "val" / "2.png").write_bytes((root / "images" / "train" / "3.png").read_bytes())
    reports = check(root)
    assert "1 images have a copy of the same photograph in another split" in reports[-1].advice[-1]
    assert "train/3.png" in reports[-1].advice[-1]


def check(root: Path):
    return check_dataset(root, find_splits(root), settings())


def test_some_objects_without_masks_are_told(tmp_path):
    root = dataset(tmp_path, {"train": [[square(10, 10, 30)]] * 3})
    file = root / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["segmentation"] = []
    file.write_text(json.dumps(content))
    (report,) = check(root)
    (problem,) = report.problems
    assert "1 objects have no mask or none that covers a pixel" in problem
    assert sum(len(sample.masks) for sample in CocoDataset(root, "train")) == 2


def test_boxes_without_masks_are_refused(tmp_path):
    root = dataset(tmp_path, {"train": [[square(10, 10, 30)]] * 3}, segmentation=[])
    (report,) = check(root)
    (problem,) = report.problems
    assert "none of the 3 objects has a mask; the model needs masks, boxes are not enough" in problem
    with pytest.raises(UserError, match="none of the 3 objects has a mask"):
        CocoDataset(root, "train")


def test_every_fault_is_reported_once_and_does_not_hide_others(tmp_path):
    root = dataset(tmp_path, {"train": [[square(10, 10, 30)]] * 6})
    (root / "images" / "train" / "1.png").unlink()
    (root / "images" / "train" / "2.png").write_bytes(b"no image")
    file = root / "annotations" / "train.json"
    content = json.loads(file.read_text())
    content["annotations"][2]["category_id"] = 7
    content["annotations"][3]["segmentation"] = [[1, 1, 1, 1, 1, 1]]
    file.write_text(json.dumps(content))
    (report,) = check(root)
    expected = (
        "unknown category 7",
        "1.png does not exist",
        "that covers a pixel: training leaves them out, in scoring they are missed, such as annotation 4",
        "2.png cannot be read",
    )
    assert len(report.problems) == len(expected)
    for problem, text in zip(report.problems, expected, strict=True):
        assert text in problem


def test_problems_of_one_kind_are_one_line():
    many = [f"data/train.json: annotation {i} of image {2 * i} has no segmentation" for i in range(200)]
    others = [f"the class '{name}' is odd" for name in "ab"]
    assert grouped([*others, *many]) == [
        "data/train.json: annotation 0 of image 0 has no segmentation (and 199 more like it)",
        "the class 'a' is odd (and 1 more like it)",
    ]
    kinds = ["a" * n for n in range(1, 15)]
    assert grouped(kinds)[-1] == "and 4 more kinds of problems"
    assert len(grouped(kinds)) == 11


def test_splits_that_are_there(tmp_path):
    images = [[square(10, 10, 30)]]
    root = dataset(tmp_path / "a", {"val": images, "test": images, "train": images})
    assert find_splits(root) == ["train", "val", "test"]
    coco = dataset(tmp_path / "b", {"val2017": images, "train2017": images})
    for split in ("train2017", "val2017"):
        (coco / "annotations" / f"{split}.json").rename(coco / "annotations" / f"instances_{split}.json")
        (coco / "annotations" / f"captions_{split}.json").write_text("{}")
    assert find_splits(coco) == ["train2017", "val2017"]
    roboflow = tmp_path / "c"
    for split in ("train", "valid"):
        (roboflow / split).mkdir(parents=True)
        (roboflow / split / "_annotations.coco.json").write_text("{}")
    assert find_splits(roboflow) == ["train", "valid"]
    with pytest.raises(UserError, match=r"no annotations of the split 'val', only of train, valid"):
        find_split(roboflow, "val")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"looked for annotations/instances_train\.json.*\. 'dimaskdino data import"):
        find_split(tmp_path / "d", "train")


def test_the_command_shows_the_images(tmp_path, capsys):
    images = [[square(10, 10, 30), square(50, 50, 20)]] * 5
    root = dataset(tmp_path / "data", {"train": images, "val": images})
    assert check_command(root, show=tmp_path / "figures" / "images.png") == 0
    printed = capsys.readouterr().out
    assert "train: 5 images" in printed
    assert "val: 5 images" in printed
    assert "0 problems" in printed
    with Image.open(tmp_path / "figures" / "images.png") as figure:
        assert min(figure.size) > 400
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    (root / "images" / "train" / "1.png").unlink()
    assert check_command(root, show=tmp_path / "other.png") == 1
    assert not (tmp_path / "other.png").exists()
    assert "correct the problems first" in capsys.readouterr().err


BOX = {"segmentation": [SQUARE], "bbox": [4, 3, 8, 6]}


def test_counts_worked_out_by_hand(tmp_path):
    data = small_dataset(
        tmp_path,
        [
            BOX,  # 48 pixels, from its box
            BOX | {"area": 32**2},
            BOX | {"area": 96**2, "category_id": 90},
            BOX | {"area": 96**2 - 1},
            BOX | {"iscrowd": 1},
        ],
    )
    found = describe(data.annotations, data.image_folder)
    assert (found.images, found.empty_images, found.objects, found.crowds) == (1, 0, 4, 1)
    assert (found.small, found.medium, found.large) == (1, 2, 1)
    assert [(c.name, c.objects, c.images) for c in found.classes] == [("cup", 3, 1), ("key", 1, 1)]
    assert found.objects_per_image == (4, 4, 4)
    assert found.longest_sides == (24, 24, 24)
    assert found.missing_files == ()
    assert "25 % small (below 32²), 50 % medium, 25 % large" in found.text()


def test_missing_images_and_unused_classes(tmp_path):
    data = small_dataset(tmp_path, [BOX], file_name="b.png")
    found = describe(data.annotations, data.image_folder)
    assert [path.name for path in found.missing_files] == ["b.png"]
    assert "key                             0 objects" in found.text()
