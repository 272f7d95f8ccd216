"""Detector and criterion on fake CUDA tensors: no mixture of devices, and how often the host waits for the device."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from fake_gpu import fake_gpu, to_fake_gpu

from dimaskdino.config import Config, load_config
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.precision import autocast
from dimaskdino.modeling.structures import Stage, Targets
from dimaskdino.training import criterion as criterion_module
from dimaskdino.training.criterion import criterion
from dimaskdino.training.matcher import Matches, matching_costs

GPU = torch.device("cuda")


@pytest.fixture(params=["shapes/dimaskdino_r18w32_2k", "shapes/maskdino_r18"])
def settings(request: pytest.FixtureRequest) -> Config:
    return load_config(request.param, ["model.backbone.weights=null"])


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # autocast looks for a GPU
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    return request.param


def batch() -> tuple[list[torch.Tensor], Targets]:
    images = [torch.zeros(3, 90, 128, dtype=torch.uint8), torch.zeros(3, 128, 100, dtype=torch.uint8)]
    masks = torch.zeros(2, 5, 128, 128, dtype=torch.uint8)
    return images, Targets(torch.zeros(2, 5, dtype=torch.long), torch.rand(2, 5, 4), masks, (5, 3))


def match_without_values(stages: Sequence[Stage], targets: Targets, settings) -> list[Matches]:
    """`match`, whose costs reach the host; fake costs have no values, and every object gets the query of its number."""
    torch.cat([cost.flatten() for cost in matching_costs(stages, targets, settings)]).cpu()
    pairs = [(np.arange(count), np.arange(count)) for count in targets.counts]
    return [Matches.from_lists(pairs, targets.labels.device) for _ in stages]


def test_inference_never_waits_for_the_device(settings, precision):
    detector = Detector(settings.model).eval()
    with fake_gpu() as waits:
        to_fake_gpu(detector)
        with torch.no_grad(), autocast(GPU, precision):
            masks = detector(ImageBatch.from_images(batch()[0], GPU)).last.mask_logits()
        assert masks.device.type == "cuda"
    assert not waits.lines


def test_training_waits_once_for_the_costs_of_matching(settings, precision, monkeypatch):
    monkeypatch.setattr(criterion_module, "match", match_without_values)
    detector = Detector(settings.model).train()
    images, targets = batch()
    with fake_gpu() as waits:
        to_fake_gpu(detector)
        targets = targets.to(GPU)
        with autocast(GPU, precision):
            predictions = detector(ImageBatch.from_images(images, GPU), targets)
        assert not waits.lines
        losses = criterion(predictions, targets, settings.loss, torch.ones((), device=GPU))
        assert losses.total.device.type == "cuda"
    assert sum(waits.lines.values()) == 1
    assert "match(" in next(iter(waits.lines))


def test_waiting_is_seen():
    with fake_gpu() as waits:
        x = torch.zeros(3, device=GPU)
        x + torch.tensor([1.0, 2.0, 3.0], device=GPU)  # from the host
        x[[0, 1]]  # the indices come from the host
        x.sum().to("cpu", non_blocking=True)
        x[x > 0]
    assert sum(waits.lines.values()) == 3
    with fake_gpu(), pytest.raises(RuntimeError, match="cuda"):
        torch.zeros(3, device=GPU) + torch.zeros(3)
