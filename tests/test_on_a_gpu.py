"""What only a GPU can show: predictions as on the CPU, trainings in every precision, batches in pinned memory."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import settings
from torchvision.ops import box_iou

import dimaskdino
from dimaskdino.data.dataloader import batches, training_dataset, training_loader
from dimaskdino.data.images import load_image
from dimaskdino.evaluation.predict import predict_images
from dimaskdino.modeling import ImageBatch
from dimaskdino.runs.folder import RunFolder
from dimaskdino.training.trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


@torch.no_grad()
@pytest.mark.parametrize("name", ["dimaskdino-shapes", "maskdino-shapes"])
def test_predictions_are_those_of_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    detector = dimaskdino.load(name, device="cpu").detector.eval()
    images = [torch.randint(256, (3, 90, 128), generator=torch.Generator().manual_seed(0))]
    expected = detector(ImageBatch.from_images(images)).stages
    found = detector.to("cuda")(ImageBatch.from_images(images, "cuda")).stages
    for stage in expected:
        torch.testing.assert_close(found[stage].boxes.cpu(), expected[stage].boxes, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found[stage].class_logits.cpu(), expected[stage].class_logits, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_the_best_detection_is_that_of_the_cpu_in_every_precision(shapes_data: Path, precision: str):
    model = replace(dimaskdino.load("dimaskdino-shapes"), precision="fp32")
    model.detector.to("cpu")
    images = [load_image(path) for path in sorted((shapes_data / "images" / "val").iterdir())]
    assert len(images) == 4
    expected = predict_images(model, images)
    model.detector.to("cuda")
    found = predict_images(replace(model, precision=precision), images)
    last = list(expected[0])[-1]
    for theirs, ours in zip(expected, found, strict=True):
        assert ours[last].labels[0] == theirs[last].labels[0]
        assert float(box_iou(ours[last].boxes[:1].cpu(), theirs[last].boxes[:1])) > 0.9


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_training_runs_to_its_end(shapes_data: Path, tmp_path: Path, precision: str):
    folder = RunFolder(tmp_path / "run")
    train(settings(shapes_data, f"train.precision={precision}"), folder)
    losses = [record["loss"] for record in folder.read_metrics() if "loss" in record]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert folder.model.exists()


def test_batches_lie_in_pinned_memory(shapes_data: Path):
    config = settings(shapes_data)
    batch = next(batches(training_loader(training_dataset(config), config, 0, 0, 1)))
    assert all(image.is_pinned() for image in batch.images)
    assert batch.targets.masks.is_pinned()
