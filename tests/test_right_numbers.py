"""Numbers are right: of pixels, times and memory, and of detections that were kept or made in batches."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.numpy import load_file
from small import settings, shapes_folder, trained_file

from dimaskdino import load
from dimaskdino.cli.models import evaluate
from dimaskdino.config import Config
from dimaskdino.data.annotations import to_run_lengths
from dimaskdino.data.check import check_dataset
from dimaskdino.data.coco import CocoDataset, encode_masks
from dimaskdino.data.dataloader import equally_padded, evaluation_dataset
from dimaskdino.data.images import load_image, to_image_tensor
from dimaskdino.data.importing import import_dataset
from dimaskdino.evaluation.layerwise_ap import detect_layers
from dimaskdino.runs import folder
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.validation import Validator
from dimaskdino.utils.distributed import DistributedContext
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.threads import available_memory

HOLD = """
import sys
from pathlib import Path
from dimaskdino.runs.folder import locked
with locked(Path(sys.argv[1]), ""):
    print("held", flush=True)
    sys.stdin.read()
"""

# ---- pixels


def stored(place, values, dtype=np.uint16):
    """The levels of a grey image file with these values."""
    file = place / "image.tif"
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


# ---- kept detections


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shapes of this module's own: tests replace images, and put them back."""
    return shapes_folder(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    return trained_file(tmp_path_factory.mktemp("model") / "model.safetensors", data)


def evaluated(model, output, *changes, **options):
    """The detections that an evaluation keeps, by part and field."""
    assert evaluate((str(model), *changes), output=output, keep_detections=True, device="cpu", **options) == 0
    return kept_in(output)


def kept_in(output):
    return {
        f"{file.name}/{name}": values.tolist()
        for file in sorted((output / "detections").glob("*.safetensors"))
        for name, values in load_file(file).items()
    }


def parts(output):
    return {file.name: file.stat().st_mtime_ns for file in (output / "detections").glob("*.safetensors")}


def test_kept_detections_serve_again_only_for_the_same_images(model, data, tmp_path):
    fresh = evaluated(model, tmp_path / "fresh")
    kept = parts(tmp_path / "fresh")
    assert evaluated(model, tmp_path / "fresh") == fresh
    assert parts(tmp_path / "fresh") == kept
    images = sorted((data / "images" / "val").iterdir())
    before = {image: (image.read_bytes(), image.stat()) for image in images}
    try:
        for image, other in zip(images, reversed(images), strict=True):
            image.write_bytes(before[other][0])  # other content under the same names
        changed = evaluated(model, tmp_path / "fresh")
        assert changed == evaluated(model, tmp_path / "new") != fresh
    finally:
        for image, (content, state) in before.items():
            image.write_bytes(content)
            os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert evaluated(model, tmp_path / "fresh") == fresh


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        (["evaluation.batch_size=2"], {}),
        (["data.resize.shortest=48"], {}),
        ([], {"split": "train"}),
        ([], {"precision": "bf16"}),
    ],
)
def test_kept_detections_of_other_settings_are_replaced(changes, options, model, tmp_path):
    evaluated(model, tmp_path / "out")
    kept = parts(tmp_path / "out")
    assert evaluated(model, tmp_path / "out", *changes, **options) == evaluated(
        model, tmp_path / "new", *changes, **options
    )
    again = parts(tmp_path / "out")
    assert not kept.items() & again.items()


def test_a_second_evaluation_in_the_same_folder_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.1)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "evaluation.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another evaluation is using {tmp_path}; wait .* another --output"):
            evaluated(model, tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["evaluation.lock"]
        first.kill()
    assert evaluated(model, tmp_path)


def test_bootstrap_samples_stay_only_beside_their_own_scores(model, data, tmp_path):
    other = trained_file(tmp_path / "other.safetensors", data, "evaluation.detections=3")
    evaluated(model, tmp_path, bootstrap=5)
    samples = (tmp_path / "bootstrap.npz").read_bytes()
    evaluated(model, tmp_path)
    assert (tmp_path / "bootstrap.npz").read_bytes() == samples
    evaluated(other, tmp_path)
    assert not (tmp_path / "bootstrap.npz").exists()


@pytest.mark.slow
def test_two_evaluations_at_once_never_mix(model, tmp_path):
    """One of them is refused, or has ended before the other begins."""
    alone = {count: evaluated(model, tmp_path / count, f"evaluation.detections={count}") for count in ("3", "7")}
    command = [sys.executable, "-m", "dimaskdino", "evaluate", str(model), "--device", "cpu", "--keep-detections"]
    command += ["--output", str(tmp_path / "out")]
    both = {
        count: subprocess.Popen([*command, f"evaluation.detections={count}"], stderr=subprocess.PIPE, text=True)
        for count in alone
    }
    refusals = {count: process.communicate()[1] for count, process in both.items()}
    ended_well = [count for count, process in both.items() if process.returncode == 0]
    assert ended_well
    for count in alone.keys() - set(ended_well):
        assert "another evaluation is using" in refusals[count]
    assert kept_in(tmp_path / "out") in [alone[count] for count in ended_well]


# ---- batches


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Forty validation images, two for each part of an evaluation, in turns of 64x64, 64x128 and 64x96 (h, w)."""
    root = shapes_folder(tmp_path_factory.mktemp("data") / "unequal", val=40)
    file = root / "annotations" / "val.json"
    content = json.loads(file.read_text())
    added = {image["id"]: (0, 64, 32)[number % 3] for number, image in enumerate(content["images"])}
    for image in content["images"]:
        path = root / "images" / "val" / image["file_name"]
        pixels = np.pad(np.asarray(Image.open(path)), ((0, 0), (0, added[image["id"]]), (0, 0)), mode="edge")
        Image.fromarray(pixels).save(path)
        image["width"] += added[image["id"]]
    for annotation in content["annotations"]:
        mask = coco_mask.decode(to_run_lengths(annotation["segmentation"], (64, 64)))
        wider = np.pad(mask, ((0, 0), (0, added[annotation["image_id"]])))
        annotation["segmentation"] = encode_masks(wider[None])[0]
    file.write_text(json.dumps(content))
    return root


SIZES = ("data.resize.shortest=64", "data.resize.longest=128")


def test_a_detection_does_not_depend_on_its_neighbours(unequal, tmp_path):
    file = trained_file(tmp_path / "model.safetensors", unequal, *SIZES)
    alone, together = (detect_layers(load(file, overrides=[f"evaluation.batch_size={n}"])) for n in (1, 8))
    for stage in alone:
        a, b = alone[stage], together[stage]
        order_a, order_b = (np.lexsort((found.scores, found.image_ids)) for found in (a, b))
        np.testing.assert_allclose(a.scores[order_a], b.scores[order_b], atol=1e-5)


def test_a_validation_does_not_depend_on_the_neighbours(unequal):
    scores = []
    for size in (1, 8):
        trained = load("dimaskdino-shapes", overrides=[f"data.root={unequal}", *SIZES, f"evaluation.batch_size={size}"])
        validator = Validator(trained.config, DistributedContext(0, 1, torch.device("cpu")), trained.classes)
        scores.append(validator.score(trained.detector))
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0]["box_AP"] > 5


def test_only_images_that_are_padded_alike_share_a_batch(unequal):
    for size, expected in ((1, [[0, 1, 2, 3, 4, 5]]), (8, [[0, 3], [1, 4], [2, 5]])):
        config = settings(unequal, *SIZES, f"evaluation.batch_size={size}")
        groups = equally_padded(evaluation_dataset(config), range(6), config)
        assert [list(group) for group in groups] == expected


# ---- orientation


def mask_folders(place, kind, orientation=1, pixels=None):
    """Two images of 6x8 pixels (h, w) as they are stored, each with a mask as the image is shown: its bright corner."""
    turned = {1: None, 3: "ROTATE_180", 6: "ROTATE_270", 8: "ROTATE_90"}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number, name in enumerate(("a", "b")):
        for part in ("images", "masks"):
            (place / name / part).mkdir(parents=True)
        mask = np.zeros((6, 8), np.uint8)
        mask[:2, :3] = 255
        image = Image.fromarray(mask // 2 + 40 * number if pixels is None else pixels + np.uint16(number))
        image.save(place / name / "images" / f"{name}.{kind}", exif=exif)
        shown = Image.fromarray(mask)
        shown = shown if turned is None else shown.transpose(Image.Transpose[turned])
        shown.save(place / name / "masks" / "1.png")
    return place


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
