"""The same objects as exports of each layout that annotation tools write."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from dimaskdino.data.annotations import to_run_lengths

SIZE = (48, 64)  # h, w
CLASSES = ("cat", "dog")
ARROW = np.array([4, 4, 30, 10, 12, 14, 8, 40], float)  # concave, so that its box is not its mask
HOUSE = np.array([36, 20, 46, 8, 56, 20, 56, 40, 36, 40], float)


def objects_of(number: int) -> list[tuple[int, np.ndarray]]:
    """Class and outline of the objects of an image: one moves, and every third image lacks the other."""
    moved = (0, ARROW + np.tile([number % 4, number % 3], 4))
    return [moved] if number % 3 == 2 else [moved, (1, HOUSE)]


def mask_of(outline: np.ndarray) -> np.ndarray:
    return coco_mask.decode(to_run_lengths([outline.tolist()], SIZE)).astype(bool)


def picture(folder: Path, number: int, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    path = folder / f"photo{number}{suffix}"
    Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def coco_content(numbers, prefix: str = "") -> dict:
    annotations = [
        {"id": len(CLASSES) * n + k, "image_id": n, "category_id": label + 5, "segmentation": [outline.tolist()]}
        for n in numbers
        for k, (label, outline) in enumerate(objects_of(n), start=1)
    ]
    for annotation in annotations:  # as some tools do
        annotation |= {"bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    images = [{"id": n, "file_name": f"{prefix}photo{n}.png", "height": SIZE[0], "width": SIZE[1]} for n in numbers]
    categories = [{"id": label + 5, "name": name} for label, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_beside(folder: Path, numbers: range) -> Path:
    for n in numbers:
        picture(folder, n)
    write_json(folder / "labels.json", coco_content(numbers))
    return folder / "labels.json"


def coco_of_cvat(folder: Path, numbers: range) -> Path:
    for n in numbers:
        picture(folder / "images", n)
    write_json(folder / "annotations" / "instances_default.json", coco_content(numbers, "images\\"))
    return folder


def coco_annotations_file(folder: Path, numbers: range) -> Path:
    return coco_of_cvat(folder, numbers) / "annotations" / "instances_default.json"


def roboflow(folder: Path, numbers: range) -> Path:
    parts = {"train": numbers[:-3], "valid": numbers[-3:-1], "test": numbers[-1:]}
    for split, part in parts.items():
        for n in part:
            picture(folder / split, n)
        content = coco_content(part)
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        for category in content["categories"][1:]:
            category["supercategory"] = "animals"
        write_json(folder / split / "_annotations.coco.json", content)
    return folder


def coco_own(folder: Path, numbers: range) -> Path:
    for split, part in (("train2017", numbers[:-2]), ("val2017", numbers[-2:])):
        for n in part:
            picture(folder / "images" / split, n)
        write_json(folder / "annotations" / f"instances_{split}.json", coco_content(part))
        write_json(folder / "annotations" / f"person_keypoints_{split}.json", coco_content(part))
        write_json(folder / "annotations" / f"image_info_{split}.json", {"images": []})
    return folder


def yolo(folder: Path, numbers: range) -> Path:
    for split, part in (("train", numbers[:-2]), ("val", numbers[-2:])):
        for n in part:
            picture(folder / "images" / split, n)
            (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
            lines = [
                " ".join([str(label), *(f"{v / SIZE[1 - i % 2]:.6f}" for i, v in enumerate(outline))])
                for label, outline in objects_of(n)
            ]
            (folder / "labels" / split / f"photo{n}.txt").write_text("\n".join(lines) + "\n")
    # paths of the machine that wrote it, and names by number
    (folder / "data.yaml").write_text("train: ../images/train\nval: C:\\data\\images\\val\nnames: {0: cat, 1: dog}\n")
    return folder


def yolo_with_lists(folder: Path, numbers: range) -> Path:
    yolo(folder, numbers)
    for split in ("train", "val"):
        names = sorted(path.name for path in (folder / "images" / split).iterdir())
        (folder / f"{split}.txt").write_text("".join(f"data/images/{split}/{name}\n" for name in names))
    (folder / "data.yaml").write_text("path: .\ntrain: train.txt\nval: val.txt\nnames: [cat, dog]\n")
    return folder / "data.yaml"


def cvat(folder: Path, numbers: range) -> Path:
    for n in numbers:
        picture(folder / "images" / "sub", n)
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    images = "".join(
        f'<image id="{n}" name="sub/photo{n}.png" width="{SIZE[1]}" height="{SIZE[0]}">'
        + "".join(
            f'<polygon label="{CLASSES[label]}" points="{";".join(f"{x},{y}" for x, y in outline.reshape(-1, 2))}"/>'
            for label, outline in objects_of(n)
        )
        + "</image>"
        for n in numbers
    )
    text = f"<annotations><meta><task><labels>{labels}</labels></task></meta>{images}</annotations>"
    (folder / "annotations.xml").write_text(text)
    return folder


def voc_xml(n: int, polygons: bool) -> str:
    objects = ""
    for label, outline in objects_of(n):
        points = outline.reshape(-1, 2)
        polygon = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(points, start=1))
        objects += f"<object><name>{CLASSES[label]}</name><bndbox><xmin>1</xmin></bndbox>" + (
            f"<polygon>{polygon}</polygon></object>" if polygons else "</object>"
        )
    return f"<annotation><filename>photo{n}.jpg</filename>{objects}</annotation>"  # the suffix may differ


def voc(folder: Path, numbers: range) -> Path:
    """VOC's own: images of object numbers, and lists of the images of each split."""
    for place in ("Annotations", "SegmentationObject", "ImageSets/Segmentation"):
        (folder / place).mkdir(parents=True)
    for n in numbers:
        picture(folder / "JPEGImages", n)
        (folder / "Annotations" / f"photo{n}.xml").write_text(voc_xml(n, polygons=False))
        ids = np.full(SIZE, 255, np.uint8)
        ids[:, :32] = 0
        for number, (_, outline) in enumerate(objects_of(n), start=1):
            ids[mask_of(outline)] = number
        Image.fromarray(ids).save(folder / "SegmentationObject" / f"photo{n}.png")
    for split, part in (("train", numbers[:-2]), ("val", numbers[-2:])):
        names = "".join(f"photo{n}\n" for n in part)
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    return folder


def voc_of_roboflow(folder: Path, numbers: range) -> Path:
    for split, part in (("train", numbers[:-2]), ("valid", numbers[-2:])):
        for n in part:
            picture(folder / split, n)
            (folder / split / f"photo{n}.xml").write_text(voc_xml(n, polygons=True))
    return folder


def labelme_shape(label: int, outline: np.ndarray, as_mask: bool) -> dict:
    if not as_mask:
        return {"label": CLASSES[label], "points": outline.reshape(-1, 2).tolist(), "shape_type": "polygon"}
    mask = mask_of(outline)
    rows, columns = np.nonzero(mask)
    small = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    stored = io.BytesIO()
    Image.fromarray(small.astype(np.uint8) * 255).save(stored, format="PNG")
    corners = [[int(columns.min()), int(rows.min())], [int(columns.max()), int(rows.max())]]
    text = base64.b64encode(stored.getvalue()).decode()
    return {"label": CLASSES[label], "points": corners, "shape_type": "mask", "mask": text}


def labelme(folder: Path, numbers: range) -> Path:
    for n in numbers:
        picture(folder, n)
        shapes = [labelme_shape(label, outline, as_mask=n % 2 == 0) for label, outline in objects_of(n)]
        content = {"imagePath": f"..\\photo{n}.png", "imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": shapes}
        write_json(folder / f"photo{n}.json", content)
    return folder


def mask_folders(folder: Path, numbers: range) -> Path:
    for n in numbers:
        picture(folder / f"photo{n}" / "images", n)
        (folder / f"photo{n}" / "masks").mkdir()
        for k, (_, outline) in enumerate(objects_of(n)):
            Image.fromarray(mask_of(outline).astype(np.uint8) * 255).save(folder / f"photo{n}" / "masks" / f"{k}.png")
    return folder


LAYOUTS = {
    "COCO": (coco_beside, coco_of_cvat, coco_annotations_file, roboflow, coco_own),
    "YOLO segmentation": (yolo, yolo_with_lists),
    "CVAT for images": (cvat,),
    "Pascal VOC": (voc, voc_of_roboflow),
    "LabelMe": (labelme,),
    "masks in folders": (mask_folders,),
}
