"""Augmentation, batches, and an order of the training images that can be taken up anywhere."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small import settings

from dimaskdino import config
from dimaskdino.data import shapes
from dimaskdino.data.coco import CocoDataset, Record, Sample, encode_masks
from dimaskdino.data.dataloader import (
    batches,
    collate,
    evaluation_dataset,
    evaluation_loader,
    training_dataset,
    training_loader,
)
from dimaskdino.data.transforms import PADDING, copy_paste, resize_image, training_transform
from dimaskdino.utils.errors import UserError


def synthetic(height: int = 40, width: int = 60) -> Sample:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, : height // 2, : width // 3], masks[1, -1:, -1:] = 1, 1
    return Sample(image, torch.tensor([1, 0]), masks, 5, "synthetic", (height, width))


def record(sample: Sample, folder: Path) -> Record:
    """The sample on disk."""
    Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / "a.png")
    masks = encode_masks(sample.masks.bool().numpy())
    return Record(folder / "a.png", sample.original_size, 5, sample.labels.tolist(), masks)


def test_jitter_gives_a_fixed_square_and_moves_image_and_masks_together(tmp_path):
    jitter = training_transform(config.Data(jitter=config.LargeScaleJitter(size=64, min_scale=0.5, max_scale=2.0)))
    torch.manual_seed(0)
    for _ in range(30):
        sample = synthetic()
        marked = replace(sample, image=(sample.masks[0] * 255).expand(3, -1, -1).contiguous())
        result = jitter(record(marked, tmp_path))
        assert result.image.shape == (3, 64, 64)
        assert result.masks.shape[1:] == (64, 64)
        assert len(result.labels) == len(result.masks)
        assert result.masks.flatten(1).any(1).all()
        if 1 in result.labels:
            mask = result.masks[result.labels.tolist().index(1)].bool()
            # antialiased edges aside, the mask lies where the image is white
            assert result.image[0][mask].float().mean() > 200


def test_jitter_pads_at_the_right_and_the_bottom(tmp_path):
    jitter = training_transform(
        config.Data(jitter=config.LargeScaleJitter(size=64, min_scale=0.5, max_scale=0.5, flip=0))
    )
    result = jitter(record(synthetic(64, 64), tmp_path))
    assert (result.image[:, 32:] == PADDING).all()
    assert (result.image[:, :, 32:] == PADDING).all()
    assert not result.masks[:, 32:].any()
    assert result.masks[0, :16, :10].all()


def test_colours_change_the_image_and_nothing_else(tmp_path):
    jitter = config.LargeScaleJitter(size=64, min_scale=0.5, max_scale=2.0)
    kinds = ("none", "colour", "strong")
    transforms = {kind: training_transform(config.Data(jitter=jitter, augmentation=kind)) for kind in kinds}
    distances: dict[str, list[float]] = {kind: [] for kind in kinds}
    sample = record(synthetic(), tmp_path)
    for seed in range(8):
        results = {}
        for kind, transform in transforms.items():
            torch.manual_seed(seed)
            results[kind] = transform(sample)
        for kind, result in results.items():
            assert torch.equal(result.masks, results["none"].masks)
            assert torch.equal(result.labels, results["none"].labels)
            distances[kind].append(float((result.image.float() - results["none"].image.float()).abs().mean()))
    assert max(distances["none"]) == 0
    assert min(distances["colour"] + distances["strong"]) > 1
    assert sum(distances["strong"]) > 1.3 * sum(distances["colour"])


def test_pasted_objects_hide_what_is_behind_them():
    def sample(colour: int, label: int, *boxes: tuple[slice, slice]) -> Sample:
        masks = torch.zeros(len(boxes), 8, 8, dtype=torch.uint8)
        for mask, (rows, columns) in zip(masks, boxes, strict=True):
            mask[rows, columns] = 1
        image = torch.full((3, 8, 8), colour, dtype=torch.uint8)
        return Sample(image, torch.full((len(boxes),), label), masks, 1, "", (8, 8))

    below = sample(10, 0, (slice(0, 4), slice(0, 8)), (slice(6, 7), slice(6, 7)))
    above = sample(200, 1, (slice(2, 8), slice(0, 8)))
    pasted = kept = 0
    for seed in range(20):
        torch.manual_seed(seed)
        result = copy_paste(below, above)
        if result is below:
            kept += 1
            continue
        pasted += 1
        assert result.labels.tolist() == [0, 1]  # the small object is covered entirely
        assert result.masks[0].nonzero().amax(0).tolist() == [1, 7]
        assert int(result.masks.sum(0).max()) == 1
        assert (result.image[:, 2:] == 200).all()
        assert (result.image[:, :2] == 10).all()
    assert pasted > 4
    assert kept > 4
    torch.manual_seed(0)
    assert copy_paste(below, sample(200, 1)) is below  # nothing to paste


def test_pasting_depends_on_the_position_alone(shapes_data):
    def read(*changes: str, first: int = 0) -> list[torch.Tensor]:
        config = settings(shapes_data, "schedule.steps=6", *changes)
        loader = training_loader(training_dataset(config), config, first, 0, 1)
        return [image for batch in batches(loader) for image in batch.images]

    plain, with_others = read(), read("data.copy_paste=0.5")
    equal = [torch.equal(a, b) for a, b in zip(plain, with_others, strict=True)]
    assert 2 <= sum(equal) <= 10
    assert all(map(torch.equal, with_others[6:], read("data.copy_paste=0.5", first=3)))


@pytest.mark.parametrize("size", [(1, 1), (30, 6000), (6000, 30)])
def test_extreme_shapes(size, tmp_path):
    sample = synthetic(*size)
    torch.manual_seed(0)
    jitter = training_transform(config.Data(jitter=config.LargeScaleJitter(size=64)))
    for _ in range(5):
        assert jitter(record(sample, tmp_path)).image.shape == (3, 64, 64)
    resized = resize_image(sample.image, config.Resize(shortest=800, longest=1333))
    assert max(resized.shape) <= 1333
    assert min(resized.shape[1:]) >= 1


def test_resize_keeps_the_aspect():
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    assert resize_image(image, config.Resize()).shape == (3, 800, 1067)
    assert resize_image(image.transpose(1, 2), config.Resize(shortest=800, longest=1000)).shape == (3, 1000, 750)


def test_collate_pads_and_makes_tight_boxes():
    small, large = synthetic(40, 60), synthetic(70, 50)
    batch = collate([small, replace(large, labels=large.labels[:1], masks=large.masks[:1])])
    assert batch.targets.masks.shape == (2, 2, 96, 64)
    assert batch.targets.counts == (2, 1)
    expected = torch.tensor([10 / 64, 10 / 96, 20 / 64, 20 / 96])  # 20 wide and high, of the padded size
    torch.testing.assert_close(batch.targets.boxes[0, 0], expected)
    assert torch.equal(batch.targets.boxes[1, 1], torch.zeros(4))


def test_the_order_depends_on_the_position_alone(shapes_data):
    options = settings(shapes_data, "data.jitter.min_scale=0.5", "schedule.steps=10")
    data = training_dataset(options)
    whole = list(training_loader(data, options, 0, 0, 1))
    later = list(training_loader(data, options, 7, 0, 1))
    workers = settings(shapes_data, "data.jitter.min_scale=0.5", "schedule.steps=10", "data.workers=2")
    parallel = list(training_loader(data, workers, 0, 0, 1))
    for left, right in [*zip(whole[7:], later, strict=True), *zip(whole, parallel, strict=True)]:
        assert left.files == right.files
        assert all(torch.equal(a, b) for a, b in zip(left.images, right.images, strict=True))
    # an epoch shows every image once
    assert len({f for batch in whole[:6] for f in batch.files}) == 12
    # two processes share the same images
    ranks = [list(training_loader(data, options, 0, rank, 2)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert batch.files == [f for part in parts for f in part.files]


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_processes_and_accumulation_work_on_the_same_pieces(batch_size, shapes_data):
    def pieces(world: int, parts: int) -> list[list[str]]:
        changes = (f"train.batch_size={batch_size}", f"train.accumulate={parts}", "schedule.steps=2")
        options = settings(shapes_data, *changes)
        ranks = [list(training_loader(training_dataset(options), options, 0, r, world)) for r in range(world)]
        steps = [rank[step * parts : (step + 1) * parts] for step in range(2) for rank in ranks]
        return [part.files for rank in steps for part in rank]

    assert pieces(2, 1) == pieces(1, 2)
    assert [f for piece in pieces(2, 1) for f in piece] == [f for piece in pieces(1, 1) for f in piece]
    assert sorted(map(len, pieces(2, 1)[:2])) == [batch_size // 2, -(-batch_size // 2)]


def test_evaluation_sees_every_image_once_resized(shapes_data):
    def loader(*changes):
        options = settings(shapes_data, *changes)
        return evaluation_loader(evaluation_dataset(options), options, [range(3), range(3, 4)])

    assert [batch.image_ids for batch in loader("evaluation.batch_size=2")] == [[0, 1], [2], [3]]
    larger = next(iter(loader("data.resize.shortest=100", "data.resize.longest=100")))
    assert larger.images[0].shape == (3, 100, 100)
    assert larger.original_sizes[0] == (64, 64)


def test_bad_images_stop_or_are_reported(shapes_data, tmp_path):
    folder = Path(shutil.copytree(shapes_data, tmp_path / "shapes"))
    for broken in list((folder / "images" / "train").iterdir())[:3]:
        broken.write_bytes(broken.read_bytes()[:100])
    for workers in (0, 1):
        options = settings(folder, f"data.workers={workers}")
        with pytest.raises(UserError, match=r"^the image .* cannot be read.*skip_bad_images=true") as caught:
            list(batches(training_loader(training_dataset(options), options, 0, 0, 1)))
        assert "Traceback" not in str(caught.value)
    options = settings(folder, "data.skip_bad_images=true")
    found = list(training_loader(training_dataset(options), options, 0, 0, 1))
    assert len({reason for batch in found for reason in batch.skipped}) == 3
    for broken in (folder / "images" / "train").iterdir():
        broken.unlink()
    with pytest.raises(UserError, match="bad images in a row"):
        list(training_loader(training_dataset(options), options, 0, 0, 1))


def test_shapes_are_deterministic_and_true_to_their_masks(shapes_data, tmp_path):
    options = config.Shapes(train=12, val=4, size=64)
    shapes.generate(tmp_path / "again", options, processes=2)
    for file in ("annotations/train.json", "annotations/val.json", "images/train/000003.jpg"):
        assert (tmp_path / "again" / file).read_bytes() == (shapes_data / file).read_bytes()
    other, _, _ = shapes.scene(options.model_copy(update={"seed": 1}), "train", 0)
    assert (other != shapes.scene(options, "train", 0)[0]).any()
    data = CocoDataset(shapes_data, "train")
    for index in range(12):
        _, labels, masks = shapes.scene(options, "train", index)
        sample = data[index]
        assert sample.labels.tolist() == labels
        assert all((a.numpy() == b).all() for a, b in zip(sample.masks, masks, strict=True))
        assert (sample.masks.sum(0) <= 1).all()  # visible parts do not overlap


def test_shapes_never_overwrite(shapes_data):
    with pytest.raises(UserError, match="exists already"):
        shapes.generate(shapes_data, config.Shapes(train=1, val=1))
