"""Images, times and limits of the machine are read as what they are."""

import re
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.data.check import check_dataset
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.images import load_image, to_image_tensor
from dimaskdino.data.importing import import_dataset
from dimaskdino.runs.folder import RunFolder
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.threads import available_memory

# ---- pixels


def stored(folder, values, dtype=np.uint16):
    """The levels of a grey image file with these values."""
    file = folder / "image.tif"
    Image.fromarray(np.array([values], dtype)).save(file)
    return load_image(file)[0, 0].tolist()


def test_a_deep_image_is_as_bright_as_its_largest_value_says(tmp_path):
    assert stored(tmp_path, [0, 100, 255]) == [0, 100, 255]
    assert stored(tmp_path, [0, 100, 256]) == [0, 99, 255]  # one value more changes the others by one level
    assert stored(tmp_path, [0, 2048, 4095]) == [0, 127, 255]  # 12 bits
    assert stored(tmp_path, [0, 257 * 7, 65535]) == [0, 7, 255]
    assert stored(tmp_path, [-5, 10, 510], np.int32) == [0, 5, 255]


def test_a_floating_point_image_has_no_jump_at_one_and_survives_a_broken_pixel(tmp_path):
    assert stored(tmp_path, [0, 0.5, 1], np.float32) == [0, 127, 255]
    assert stored(tmp_path, [0, 0.5, 1.01], np.float32) == [0, 126, 255]
    assert stored(tmp_path, [np.nan, 0.5, 1], np.float32) == [0, 127, 255]
    assert stored(tmp_path, [-np.inf, 100, 200, np.inf], np.float32) == [0, 127, 255, 255]
    assert stored(tmp_path, [np.nan, np.nan], np.float32) == [0, 0]


@pytest.mark.parametrize("dtype", [np.uint16, ">u2", ">i4", np.uint64, np.int8, np.uint8])
def test_arrays_of_every_type_of_integers(dtype):
    assert to_image_tensor(np.array([[0, 7, 100]], dtype))[0, 0].tolist() == [0, 7, 100]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8", np.longdouble])
def test_arrays_of_every_type_of_floating_point_numbers(dtype):
    assert to_image_tensor(np.array([[0, 0.5, 1]], dtype))[0, 0].tolist() == [0, 128, 255]


def test_booleans_are_black_and_white():
    values = np.array([[False, True]])
    for image in (values, torch.from_numpy(values)[None], Image.fromarray(values)):
        assert to_image_tensor(image)[0, 0].tolist() == [0, 255]


def test_tensors_of_unsigned_and_short_types():
    assert to_image_tensor(torch.full((1, 1, 1), 7, dtype=torch.uint16)).unique().tolist() == [7]
    assert to_image_tensor(torch.full((1, 1, 1), 1, dtype=torch.bfloat16)).unique().tolist() == [255]


@pytest.mark.parametrize(
    "image", [np.array([[1]], object), np.array([["a"]]), np.array([[1j]]), torch.ones(1, 1, 1, dtype=torch.complex64)]
)
def test_arrays_of_anything_else_are_refused(image):
    with pytest.raises(UserError, match="the values of an image are"):
        to_image_tensor(image)


def test_the_check_reports_the_range_of_deep_images(tmp_path):
    source = mask_folders(tmp_path / "source", "png", pixels=np.linspace(3, 4000, 48).reshape(6, 8).astype(np.uint16))
    import_dataset(source, tmp_path / "data", val=0.5)
    reports = check_dataset(tmp_path / "data", ["train", "val"], Config())
    for report in reports:
        assert not report.problems
    lines = [line for report in reports for line in report.advice if "1 grey image has more than 8 bits" in line]
    assert len(lines) == 2
    assert {"from 3 to 4000", "from 4 to 4001"} == {
        match for line in lines for match in re.findall(r"from \d+ to \d+", line)
    }


# ---- orientation


def mask_folders(folder, kind, orientation=1, pixels=None):
    """Two images of 6x8 pixels (h, w) as they are stored, each with a mask as the image is shown: its bright corner."""
    turned = {1: None, 3: "ROTATE_180", 6: "ROTATE_270", 8: "ROTATE_90"}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number, name in enumerate(("a", "b")):
        for part in ("images", "masks"):
            (folder / name / part).mkdir(parents=True)
        mask = np.zeros((6, 8), np.uint8)
        mask[:2, :3] = 255
        image = Image.fromarray(mask // 2 + 40 * number if pixels is None else pixels + np.uint16(number))
        image.save(folder / name / "images" / f"{name}.{kind}", exif=exif)
        shown = Image.fromarray(mask)
        shown = shown if turned is None else shown.transpose(Image.Transpose[turned])
        shown.save(folder / name / "masks" / "1.png")
    return folder


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["tif", "jpg", "png", "webp"])
def test_an_orientation_is_applied_once_whatever_the_format(kind, orientation, tmp_path):
    source = mask_folders(tmp_path / "source", kind, orientation)
    import_dataset(source, tmp_path / "data", val=0.5)
    reports = check_dataset(tmp_path / "data", ["train", "val"], Config())
    assert [report.problems for report in reports] == [[], []]
    sample = CocoDataset(tmp_path / "data", "train")[0]
    assert sample.image.shape[1:] == ((8, 6) if orientation >= 5 else (6, 8))
    assert torch.equal(sample.image[0] > 64, sample.masks[0].bool())


# ---- the machine


@pytest.fixture
def in_new_york(monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("in_new_york")
def test_a_run_that_ends_in_the_repeated_hour_has_ended(tmp_path):
    started = 1762063200.0  # 2025-11-02 02:00 EDT, when the clock goes back to 01:00 EST
    assert time.strftime("%H:%M %Z", time.localtime(started - 60)) == "01:59 EDT"
    for seconds, expected in ((-61, False), (-60, True), (0, True), (600, True)):
        ended = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started + seconds))
        (tmp_path / "status.json").write_text(f'{{"state": "stopped", "ended": "{ended}"}}')
        assert RunFolder(tmp_path).ended_since(started - 60 + 0.5) == expected


@pytest.mark.parametrize(
    "status", ['{"state": "stopped"}', '{"state": "stopped", "ended": 5}', '{"state": "stopped", "ended": "x"}']
)
def test_a_status_without_a_time_has_not_ended(status, tmp_path):
    (tmp_path / "status.json").write_text(status)
    assert not RunFolder(tmp_path).ended_since(0)


@pytest.mark.parametrize(
    ("groups", "file", "limit"),
    [
        ("0::/pods/mine\n", "pods/mine/memory.max", "5000000"),
        ("0::/pods/mine\n", "pods/memory.max", "5000000"),  # of a group around it
        ("0::/\n", "memory.max", "5000000"),  # in a container of its own namespace
        ("5:cpu,cpuacct:/x\n4:memory:/pods/mine\n0::/\n", "memory/pods/mine/memory.limit_in_bytes", "5000000"),
        ("4:memory:/docker/0815\n", "memory/memory.limit_in_bytes", "5000000"),  # a container sees its group as the top
        ("0::/pods/mine\n", "pods/mine/memory.max", "max"),
        ("4:memory:/\n", "memory/memory.limit_in_bytes", "9223372036854771712"),
        ("5:cpu:/mine\n", "memory/mine/memory.limit_in_bytes", "5000000"),  # not the group of the memory
    ],
)
def test_the_memory_is_that_of_the_container(groups, file, limit, tmp_path):
    everything = available_memory(tmp_path)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    place = tmp_path / "sys" / "fs" / "cgroup" / file
    place.parent.mkdir(parents=True)
    place.write_text(f"{limit}\n")
    expected = 5_000_000 if limit == "5000000" and "cpu:/mine" not in groups else everything
    assert available_memory(tmp_path) == expected
    assert everything > 5_000_000
