"""COCO-format folders: what is read, and what is said of files that cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from dimaskdino.data.coco import CocoDataset, find_split
from dimaskdino.data.images import load_image
from dimaskdino.utils.errors import UserError

TINY_COCO = Path(__file__).parents[3] / "shared" / "data" / "tiny_coco"
SQUARE = [4, 3, 12, 3, 12, 9, 4, 9]


def dataset(
    folder: Path, annotations: list[dict], categories: list[dict] | None = None, **image: object
) -> CocoDataset:
    """A folder with one 24x20 image (height 20) and these annotations."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "train").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (200, 30, 10)).save(folder / "images" / "train" / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 24} | image],
        "annotations": [{"id": 100 + i, "image_id": 7, "category_id": 3, **a} for i, a in enumerate(annotations)],
        "categories": categories or [{"id": 3, "name": "cup"}, {"id": 90, "name": "key"}],
    }
    (folder / "annotations" / "train.json").write_text(json.dumps(content))
    return CocoDataset(folder, "train")


def rle(mask: np.ndarray, compressed: bool) -> dict:
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    flat = mask.flatten(order="F").astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], changes])).tolist()}


def test_polygons_and_both_kinds_of_rle(tmp_path):
    mask = np.zeros((20, 24), bool)
    mask[3:9, 4:12] = True
    data = dataset(
        tmp_path,
        [
            {"segmentation": [SQUARE]},
            {"segmentation": rle(mask, True), "category_id": 90},
            {"segmentation": rle(mask, False)},
        ],
    )
    sample = data[0]
    assert data.classes == ["cup", "key"]  # ids 3 and 90 become 0 and 1
    assert sample.labels.tolist() == [0, 1, 0]
    for found in sample.masks:
        assert torch.equal(found.bool(), torch.from_numpy(mask))
    assert (sample.image_id, sample.original_size) == (7, (20, 24))


def test_crowds_are_no_objects_and_empty_outlines_are_dropped(tmp_path):
    crowd = {"segmentation": rle(np.ones((20, 24), bool), False), "iscrowd": 1}
    one_point, line = {"segmentation": [[5, 5]]}, {"segmentation": [[5, 5, 5, 5, 5, 5]]}
    sample = dataset(tmp_path, [crowd, {"segmentation": [SQUARE]}, one_point, line, {"segmentation": []}])[0]
    assert len(sample.labels) == 1


def test_parts_outside_the_image_are_cut_off(tmp_path):
    sample = dataset(tmp_path, [{"segmentation": [[-10, -10, 12, -10, 12, 9, -10, 9]]}])[0]
    assert sample.masks[0].sum() == 12 * 9


def test_images_without_objects(tmp_path):
    assert len(dataset(tmp_path, [])[0].labels) == 0
    with pytest.raises(UserError, match="no image with an object"):
        CocoDataset(tmp_path, "train", only_with_objects=True)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; set data.root"):
        find_split(tmp_path / "none", "train")
    dataset(tmp_path, [])
    with pytest.raises(UserError, match="no annotations of the split 'val'"):
        find_split(tmp_path, "val")


def test_a_size_that_contradicts_the_annotations(tmp_path):
    with pytest.raises(UserError, match="20x24, the annotations say 24x20"):
        dataset(tmp_path, [], height=24, width=20)[0]


def gradient(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.linear_gradient("L").resize(size)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "LA", "1"])
def test_colour_modes(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = gradient().convert("RGB").convert(mode)
    image.save(path)
    found = load_image(path)
    assert found.shape == (3, 30, 40)
    assert torch.equal(found, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def test_16_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    found = load_image(tmp_path / "x.png")
    assert (int(found.min()), int(found.max())) == (0, 255)
    np.testing.assert_allclose(found[0].numpy(), values / 257, atol=1)


def test_orientation_stored_in_the_file_is_applied_unless_the_annotations_say_otherwise(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    gradient((40, 30)).convert("RGB").save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").shape == (3, 40, 30)
    assert load_image(tmp_path / "x.jpg", (30, 40)).shape == (3, 30, 40)


def test_files_that_are_no_images(tmp_path):
    gradient((400, 300)).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-1500])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png"):
        with pytest.raises(UserError, match=f"{name} cannot be read, it may be truncated"):
            load_image(tmp_path / name)
    with pytest.raises(UserError, match=r"none.jpg does not exist"):
        load_image(tmp_path / "none.jpg")


@pytest.mark.skipif(not TINY_COCO.exists(), reason="the folder with 38 images of COCO is not here")
def test_real_coco_masks_agree_with_their_annotations():
    data = CocoDataset(TINY_COCO, "train2017")
    assert len(data) == 32
    assert len(data.classes) == 80
    assert (data.classes[0], data.classes[-1]) == ("person", "toothbrush")
    content = json.loads(data.annotations_file.read_text())
    for i, record in enumerate(data.images):
        objects = [a for a in content["annotations"] if a["image_id"] == record["id"] and not a["iscrowd"]]
        areas = [float(mask.sum()) for mask in data[i].masks]
        np.testing.assert_allclose(sorted(areas), sorted(a["area"] for a in objects), rtol=0.25, atol=40)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.5, 127), (1.0, 255), (200.0, 255), (65535.0, 255)])
def test_floating_point_tiffs_are_shares_of_white_up_to_one(value, expected, tmp_path):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tiff")
    assert abs(int(load_image(tmp_path / "a.tiff")[0, 0, 0]) - expected) <= 1
