"""Each layout that annotation tools export gives the same data; a broken one gives a message and no folder."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from exported import (
    ARROW,
    CLASSES,
    HOUSE,
    LAYOUTS,
    SIZE,
    coco_beside,
    coco_own,
    cvat,
    labelme,
    mask_folders,
    mask_of,
    objects_of,
    picture,
    roboflow,
    voc,
    voc_of_roboflow,
    yolo,
)
from PIL import Image
from pycocotools import mask as coco_mask

from dimaskdino.data import importing
from dimaskdino.data.annotations import read_annotations, to_run_lengths
from dimaskdino.data.coco import CocoDataset, encode_masks
from dimaskdino.data.duplicates import groups_of_copies, shared_between
from dimaskdino.data.importing import import_dataset
from dimaskdino.utils.errors import UserError

CASES = [(layout, write) for layout, writers in LAYOUTS.items() for write in writers]


@pytest.mark.parametrize("number_of_images", [20, 9])
@pytest.mark.parametrize(("layout", "write"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_every_object_survives_the_import_of_each_layout(layout, write, number_of_images, tmp_path):
    source, folder = write(tmp_path / "export", range(1, number_of_images + 1)), tmp_path / "data"
    before = {path: path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()}
    done = import_dataset(source, folder)
    assert done.layout == layout
    assert {path: path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()} == before
    found = {}
    for split in done.counts:
        data = CocoDataset(folder, split)
        names = ["object"] if layout == "masks in folders" else sorted(CLASSES)
        assert sorted(data.classes) == names
        for sample in data:
            number = int(Path(sample.file).stem.removeprefix("photo"))
            found[number] = sample
            expected = objects_of(number)
            assert len(sample.masks) == len(expected)
            for label, mask in zip(sample.labels, sample.masks, strict=True):
                name = data.classes[label]
                outline = dict(expected)[CLASSES.index(name)] if name in CLASSES else None
                wanted = [mask_of(o) for o in ([outline] if outline is not None else dict(expected).values())]
                assert any(np.array_equal(mask.numpy().astype(bool), w) for w in wanted)
        annotations = read_annotations(folder / "annotations" / f"{split}.json")
        assert not annotations.remarks
        for annotation in annotations.annotations:
            rle = to_run_lengths(annotation["segmentation"], SIZE)
            assert annotation["area"] == coco_mask.area(rle)
            assert annotation["bbox"] == coco_mask.toBbox(rle).tolist()
            if isinstance(annotation["segmentation"], list):  # outlines stay outlines
                assert write not in (mask_folders, voc)
    assert sorted(found) == list(range(1, number_of_images + 1))
    assert done.counts["val"][0] >= 1


def test_images_are_linked_when_asked(tmp_path, monkeypatch):
    source = coco_beside(tmp_path / "export", range(6))
    done = import_dataset(source, tmp_path / "hard", link=True)
    assert any("6 images hard-linked: " in remark for remark in done.remarks)
    (image,) = (tmp_path / "hard").rglob("photo3.png")
    assert image.samefile(source.parent / "photo3.png")

    def refuse(*paths: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    done = import_dataset(source, tmp_path / "symbolic", link=True)
    assert any("6 images linked to the source" in remark for remark in done.remarks)
    (image,) = (tmp_path / "symbolic").rglob("photo3.png")
    assert image.is_symlink()
    monkeypatch.setattr(os, "symlink", refuse)
    import_dataset(source, tmp_path / "copies", link=True)
    assert len(CocoDataset(tmp_path / "copies", "train")) + len(CocoDataset(tmp_path / "copies", "val")) == 6


def test_the_division_is_seeded_and_keeps_copies_together(tmp_path):
    source = coco_beside(tmp_path / "export", range(24))
    content = json.loads(source.read_text())
    for n in range(0, 24, 4):  # photo 0, 4, 8 … exist twice: under another name, or as another version of Roboflow's
        original = source.parent / f"photo{n}.png"
        if n % 8:
            name = f"photo{n}_png.rf.0a1b{n}.png"
            Image.open(original).point(lambda value: value // 2).save(source.parent / name)
        else:
            name = f"copy{n}.png"
            shutil.copyfile(original, source.parent / name)
        image = {"id": 100 + n, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        content["images"].append(image)
    source.write_text(json.dumps(content))
    draws = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = import_dataset(source, tmp_path / name, seed=seed)
        assert any("12 copies of the same photograph stay in one split" in remark for remark in done.remarks)
        val = {path.name for path in (tmp_path / name / "images" / "val").iterdir()}
        assert 5 <= len(val) <= 8
        for n in range(0, 24, 4):
            twin = f"photo{n}_png.rf.0a1b{n}.png" if n % 8 else f"copy{n}.png"
            assert (f"photo{n}.png" in val) == (twin in val)
        draws[name] = val
    assert draws["a"] == draws["b"] != draws["c"]


def test_each_class_has_its_share_of_the_validation_images(tmp_path):
    source = coco_beside(tmp_path / "export", range(60))
    content = json.loads(source.read_text())
    content["categories"].append({"id": 9, "name": "rare"})
    for annotation in content["annotations"]:
        if annotation["image_id"] < 10 and annotation["category_id"] == 5:
            annotation["category_id"] = 9
    source.write_text(json.dumps(content))
    for seed in range(4):
        import_dataset(source, tmp_path / f"{seed}", seed=seed)
        val = read_annotations(tmp_path / f"{seed}" / "annotations" / "val.json")
        assert sum(annotation["category_id"] == 3 for annotation in val.annotations) == 2


def test_duplicates_between_the_splits_of_the_source_are_told(tmp_path):
    folder = roboflow(tmp_path / "export", range(12))
    assert not any("photograph" in remark for remark in import_dataset(folder, tmp_path / "clean").remarks)
    content = json.loads((folder / "valid" / "_annotations.coco.json").read_text())
    (folder / "train" / "photo0.png").rename(folder / "train" / "same.png")
    train = (folder / "train" / "_annotations.coco.json").read_text().replace("photo0.png", "same.png")
    (folder / "train" / "_annotations.coco.json").write_text(train)
    shutil.copyfile(folder / "train" / "same.png", folder / "valid" / content["images"][0]["file_name"])
    done = import_dataset(folder, tmp_path / "data")
    assert any("1 images have a copy of the same photograph in another split" in remark for remark in done.remarks)


def test_copies_are_known_by_name_or_content_alone(tmp_path):
    def photograph(name: str, content: bytes) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    paths = [
        photograph("first/a.jpg", b"one"),
        photograph("first/A_jpg.rf.0ab.jpg", b"two"),  # Roboflow's version of the first
        photograph("first/b.png", b"two"),  # the same file as the version
        photograph("second/a.webp", b"three"),
        photograph("second/c.png", b"six"),  # of the same size as others
    ]
    assert groups_of_copies(paths) == [0, 0, 0, 0, 1]
    assert groups_of_copies(paths, versions_alone=True) == [0, 1, 1, 2, 3]
    assert shared_between({"train": paths[:2], "val": paths[2:]}) == [(paths[1], paths[2])]


def test_crowds_holes_and_parts_survive(tmp_path):
    source = coco_beside(tmp_path / "export", range(4))
    content = json.loads(source.read_text())
    ring = np.zeros(SIZE, bool)
    ring[5:25, 5:25] = True
    ring[10:20, 10:20] = False
    (rle,) = encode_masks(ring[None])
    content["annotations"][0]["segmentation"] = rle
    content["annotations"][1] |= {"segmentation": [ARROW.tolist(), (HOUSE).tolist()]}
    content["annotations"].append(
        {"id": 99, "image_id": 0, "category_id": 5, "segmentation": rle, "iscrowd": 1, "bbox": [5, 5, 20, 20]}
    )
    source.write_text(json.dumps(content))
    import_dataset(source, tmp_path / "data")
    splits = [read_annotations(tmp_path / "data" / "annotations" / f"{s}.json").annotations for s in ("train", "val")]
    annotations = [annotation for split in splits for annotation in split]
    assert sum(annotation["iscrowd"] for annotation in annotations) == 1
    assert sum(annotation["area"] == ring.sum() for annotation in annotations) == 2
    assert any(len(annotation["segmentation"]) == 2 for annotation in annotations if not annotation["iscrowd"])


def test_labelme_joins_the_parts_of_a_group(tmp_path):
    source = labelme(tmp_path / "export", range(1, 5))
    file = source / "photo1.json"
    content = json.loads(file.read_text())
    for shape in content["shapes"]:
        shape |= {"label": "cat", "group_id": 3}
    circle = {"label": "dog", "points": [[20, 20], [20, 30]], "shape_type": "circle"}
    content["shapes"] += [circle, {"label": "dog", "points": [[1, 1], [3, 3]], "shape_type": "line"}]
    content["shapes"] += [{"label": "dog", "points": [[1, 1], [9, 9]], "shape_type": "rectangle"}]
    file.write_text(json.dumps(content))
    done = import_dataset(source, tmp_path / "data")
    assert "1 shapes of the type line, left out" in done.remarks
    assert "1 objects with a box and no mask, left out" in done.remarks
    samples = {Path(s.file).stem: s for split in done.counts for s in CocoDataset(tmp_path / "data", split)}
    parts, disk = sorted(samples["photo1"].masks, key=lambda mask: -int(mask.sum()))
    expected = np.any([mask_of(outline) for _, outline in objects_of(1)], axis=0)
    areas = sorted([int(parts.sum()), int(disk.sum())])
    assert areas == sorted([int(expected.sum()), areas[0] if areas[1] == expected.sum() else areas[1]])
    assert abs(min(areas, key=lambda a: abs(a - np.pi * 100)) - np.pi * 100) < 12


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def without_masks(file: Path) -> None:
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    file.write_text(json.dumps(content))


BROKEN = [
    (coco_beside, "labels.json", lambda f: f.write_text(f.read_text()[:100]), "is not valid json"),
    (coco_beside, "labels.json", without_masks, "objects with boxes alone; the model learns from masks"),
    (coco_beside, "labels.json", lambda f: change(f, "photo", "other"), "'other1.png' of .* is not among the 9 images"),
    (coco_beside, "labels.json", lambda f: change(f, '"id": 5, "name"', '"id": 6, "name"'), "category id 6 occurs"),
    (coco_beside, "labels.json", lambda f: change(f, "dog", "cat"), "two classes have the name 'cat'"),
    (
        coco_own,
        "annotations/instances_train2017.json",
        lambda f: f.rename(f.parent / "all_train.json"),
        "2 annotation files",
    ),
    (roboflow, "train/_annotations.coco.json", lambda f: f.unlink(), "but no training split; rename one to train"),
    (yolo, "data.yaml", lambda f: change(f, "images/train", "images/trian"), "'train: ../images/trian' does not exist"),
    (yolo, "data.yaml", lambda f: f.write_text("names: []\ntrain: images/train"), "'names' must list the classes"),
    (yolo, "data.yaml", lambda f: f.write_text("names: [cat]\ntrain: images/train"), "class '1' is not one of the 1"),
    (yolo, "labels/train/photo1.txt", lambda f: f.write_text("0 1 2 3 4 5 6"), "photo1.txt, line 1: coordinates must"),
    (yolo, "labels/train/photo1.txt", lambda f: f.write_text("\n0 0.1 0.2 0.3"), "photo1.txt, line 2: expected the"),
    (yolo, "labels/train/photo1.txt", lambda f: f.write_text("0 0.1 x 0.3 1 1 0"), "line 1: something is not a number"),
    (
        yolo,
        "labels",
        lambda f: f.rename(f.parent / "texts"),
        "has a label file; that of .*photo1.png would be .*labels",
    ),
    (cvat, "annotations.xml", lambda f: f.write_text(f.read_text()[:200]), "is not valid XML"),
    (cvat, "annotations.xml", lambda f: change(f, "sub/photo1.png", "gone.png"), "'gone.png' of .* is not among the 9"),
    (cvat, "annotations.xml", lambda f: change(f, 'width="64"', ""), "cannot be read as CVAT for images 1.1"),
    (voc, "Annotations/photo1.xml", lambda f: change(f, "<name>cat</name>", ""), "<object> has no <name>"),
    (voc, "JPEGImages/photo1.png", lambda f: f.unlink(), "'photo1.jpg' of .*photo1.xml is not among the 8 images"),
    (voc, "SegmentationObject/photo1.png", lambda f: Image.new("L", (9, 9)).save(f), "is 9x9, its image 48x64"),
    (voc, "SegmentationObject", lambda f: f.rename(f.parent / "other"), "15 objects with boxes alone"),
    (voc_of_roboflow, "train/photo1.xml", lambda f: change(f, "<x1>5.0", "<x1>five"), "a polygon must hold x1, y1"),
    (labelme, "photo1.json", lambda f: change(f, '"polygon"', '"circle"'), "a circle must have its centre"),
    (labelme, "photo1.json", lambda f: change(f, "imageHeight", "height"), "has no 'imagePath', 'imageHeight'"),
    (labelme, "photo2.json", lambda f: change(f, '"mask": "', '"mask": "x'), "the mask of a shape cannot be read"),
    (labelme, "photo2.png", lambda f: f.unlink(), r"'..\\photo2.png' of .*photo2.json is not among the 8 images"),
    (mask_folders, "photo1/masks/0.png", lambda f: f.write_bytes(b"no image"), "the mask .* cannot be read"),
    (mask_folders, "photo1/masks/0.png", lambda f: Image.new("L", (9, 9)).save(f), "is 9x9, its image 48x64"),
    (mask_folders, "photo1/images/photo1.png", lambda f: f.rename(f.parent / "a.txt"), "must hold one image"),
]


@pytest.mark.parametrize(
    ("write", "file", "spoil", "says"), BROKEN, ids=[f"{w.__name__}-{i}" for i, (w, *_) in enumerate(BROKEN)]
)
def test_a_broken_export_is_refused_and_nothing_is_written(write, file, spoil, says, tmp_path):
    source, folder = write(tmp_path / "export", range(1, 10)), tmp_path / "data"
    spoil(tmp_path / "export" / file)
    with pytest.raises(UserError, match=says):
        import_dataset(source, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_cannot_be_imported(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        import_dataset(tmp_path / "none", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no export of a known layout .*; it holds no files"):
        import_dataset(tmp_path / "empty", tmp_path / "data")
    picture(tmp_path / "empty", 1)
    with pytest.raises(UserError, match=r"it holds 1 \.png"):
        import_dataset(tmp_path / "empty", tmp_path / "data")
    source = coco_beside(tmp_path / "one", range(1))
    with pytest.raises(UserError, match="1 image of one photograph cannot be divided"):
        import_dataset(source, tmp_path / "data")
    with pytest.raises(UserError, match="between 0 and 1, got 20"):
        import_dataset(source, tmp_path / "data", val=20)
    with pytest.raises(UserError, match="exists already"):
        import_dataset(source, tmp_path / "one")
    assert not (tmp_path / "data").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = coco_beside(tmp_path / "export", range(6))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "x.json")

    monkeypatch.setattr(importing, "json", SimpleNamespace(dumps=full))
    with pytest.raises(UserError, match="the disk is full"):
        import_dataset(source, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
