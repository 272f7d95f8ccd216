"""Masks are decoded at the size of the sample, and equal those that are transformed at the image's size."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import tv_tensors
from torchvision.transforms import v2

from dimaskdino.config import Data, LargeScaleJitter, Resize
from dimaskdino.data.annotations import run_lengths, to_run_lengths
from dimaskdino.data.coco import CocoDataset, encode_masks
from dimaskdino.data.images import load_image
from dimaskdino.data.transforms import _PadTo, _ScaleJitter, resize_image, resize_with_objects, training_transform
from dimaskdino.modeling import CroppedMasks
from dimaskdino.utils.errors import UserError


def dataset(folder, size, polygons, name="a.png"):
    """One image of noise with polygons, every second one as run lengths."""
    height, width = size
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    image.save(folder / "images" / "train" / name, quality=90)
    annotations = []
    for number, outline in enumerate(polygons, start=1):
        segmentation = [outline]
        if number % 2:
            (segmentation,) = encode_masks(coco_mask.decode(to_run_lengths([outline], size))[None].astype(bool))
        box = {"bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0}
        annotations.append({"id": number, "image_id": 1, "category_id": 1, "segmentation": segmentation} | box)
    content = {
        "images": [{"id": 1, "file_name": name, "height": height, "width": width}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": annotations,
    }
    (folder / "annotations" / "train.json").write_text(json.dumps(content))
    return folder


def star(x, y, radius, corners=9):
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radii = np.where(np.arange(corners) % 2, radius, radius / 2)
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1).ravel().tolist()


def objects(size, count):
    random = np.random.default_rng(1)
    places = random.uniform(0, 1, (count, 2)) * (size[1], size[0])
    return [star(x, y, radius) for (x, y), radius in zip(places, random.uniform(2, min(size) / 3, count), strict=True)]


def reference(sample, jitter, resize):
    """All masks at full size, then torchvision."""
    image, masks = tv_tensors.Image(sample.image), tv_tensors.Mask(sample.masks)
    if resize is None:
        square = (jitter.size, jitter.size)
        scale = _ScaleJitter(square, (jitter.min_scale, jitter.max_scale), antialias=True)
        pipeline = v2.Compose([v2.RandomHorizontalFlip(jitter.flip), scale, _PadTo(jitter.size), v2.RandomCrop(square)])
        image, masks = pipeline(image, masks)
    else:
        image = resize_image(sample.image, resize)
        masks = v2.functional.resize(masks, list(image.shape[-2:]))
    return image, masks[masks.flatten(1).any(1).bool()]


@pytest.mark.parametrize("size", [(97, 61), (64, 64), (31, 200), (300, 411)])
def test_masks_equal_those_that_are_transformed_at_full_size(tmp_path, size):
    data = dataset(tmp_path, size, objects(size, 12))
    full = CocoDataset(data, "train")[0]
    for jitter in (LargeScaleJitter(size=64), LargeScaleJitter(size=64, min_scale=1, max_scale=3, flip=1)):
        settings = Data(root=data, train="train", jitter=jitter)
        for seed in range(25):
            torch.manual_seed(seed)
            expected_image, expected_masks = reference(full, jitter, None)
            after = torch.rand(1)
            torch.manual_seed(seed)
            found = CocoDataset(data, "train", training_transform(settings))[0]
            assert torch.equal(torch.rand(1), after)  # as many random numbers
            assert torch.equal(found.image, expected_image)
            assert torch.equal(found.masks, expected_masks)
    for resize in (Resize(shortest=50, longest=80), Resize(shortest=200, longest=400)):
        expected_image, expected_masks = reference(full, None, resize)
        found = CocoDataset(data, "train", resize_with_objects(resize))[0]
        assert torch.equal(found.image, expected_image)
        assert torch.equal(found.masks, expected_masks)


def test_run_lengths_are_those_of_pycocotools():
    random = np.random.default_rng(0)
    for _ in range(60):
        height, width = random.integers(1, 200, 2)
        mask = random.random((height, width)) < random.choice([0.001, 0.5, 0.999])
        flat = np.r_[False, mask.ravel(order="F"), False]
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        expected = np.diff(np.r_[0, edges, height * width] if not mask[-1, -1] else np.r_[0, edges])
        found = run_lengths(encode_masks(mask[None])[0]["counts"])
        assert found.tolist() == expected.tolist()
    assert run_lengths("").tolist() == []


@pytest.mark.parametrize("counts", ["\x00", "~~", "o" * 30 + "1", "PPPP", b"\xff"])
def test_what_are_no_run_lengths(counts):
    with pytest.raises(ValueError, match="run lengths"):
        run_lengths(counts)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_smaller_in_its_orientation(tmp_path, orientation):
    picture = Image.fromarray(np.kron(np.arange(12).reshape(3, 4) * 20, np.ones((200, 200))).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.convert("RGB").save(tmp_path / "a.jpg", quality=95, exif=exif)
    full = load_image(tmp_path / "a.jpg")
    size = tuple(full.shape[-2:])
    small = load_image(tmp_path / "a.jpg", expected=size, least=(size[0] // 4, size[1] // 4))
    assert tuple(small.shape[-2:]) == (size[0] // 4, size[1] // 4)
    assert (resize_image(full, Resize(shortest=150, longest=200)).float() - small.float()).abs().mean() < 3
    unrotated = load_image(tmp_path / "a.jpg", expected=(600, 800), least=(300, 400))
    assert tuple(unrotated.shape[-2:]) == (300, 400)
    assert torch.equal(load_image(tmp_path / "a.jpg", least=(601, 801)), full)


@pytest.mark.slow
def test_a_photograph_of_24_megapixels_with_100_objects(tmp_path):
    """In a process of its own: 0.6 s and 0.3 GB more than the decoded image, which has 72 MB."""
    size = (4000, 6000)
    data = dataset(tmp_path, size, objects(size, 100), "a.jpg")
    program = f"""
import resource, time, torch
from dimaskdino.config import Data
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.transforms import training_transform
torch.set_num_threads(1)
settings = Data(root={str(data)!r}, train="train")
dataset = CocoDataset(settings.root, "train", training_transform(settings))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for seed in range(5):
    torch.manual_seed(seed)
    start = time.perf_counter()
    dataset[0]
    times.append(time.perf_counter() - start)
print(min(times), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 0.6
    assert gigabytes < 0.072 + 0.3


def test_crops_are_encoded_as_whole_masks():
    random = np.random.default_rng(0)
    size = (41, 57)
    whole = np.zeros((60, *size), bool)
    corners, crops = [], []
    for mask in whole:
        top, left = random.integers(0, size[0]), random.integers(0, size[1])
        height, width = random.integers(0, size[0] - top + 1), random.integers(0, size[1] - left + 1)
        crop = random.random((height, width)) < random.choice([0.1, 0.9, 1.0])
        mask[top : top + height, left : left + width] = crop
        corners.append((int(top), int(left)))
        crops.append(torch.from_numpy(crop))
    masks = CroppedMasks(size, tuple(corners), tuple(crops))
    assert encode_masks(masks) == encode_masks(whole)
    assert np.array_equal(masks.whole().numpy(), whole)
    assert torch.equal(masks.only([3, 3, 1]).whole(), masks.whole()[[3, 3, 1]])
    assert encode_masks(masks.only([])) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_has_the_size_of_its_pixels(tmp_path, orientation):
    Image.new("L", (60, 40)).save(tmp_path / "a.tif", tiffinfo={0x0112: orientation})
    size = tuple(load_image(tmp_path / "a.tif").shape[-2:])
    assert tuple(load_image(tmp_path / "a.tif", expected=size).shape[-2:]) == size
    with pytest.raises(UserError, match="the annotations say"):
        load_image(tmp_path / "a.tif", expected=size[::-1])
