"""Detector and criterion on fake CUDA tensors: no mixture of devices, and how often the host waits for the device."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from fake_gpu import fake_gpu, to_fake_gpu

from dimaskdino.config import Config, load_config
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.backbone import build_backbone
from dimaskdino.modeling.precision import autocast
from dimaskdino.modeling.structures import Stage, Targets
from dimaskdino.training import criterion as criterion_module
from dimaskdino.training.criterion import criterion
from dimaskdino.training.matcher import Matches, matching_costs

GPU = torch.device("cuda")


@pytest.fixture(params=["shapes/dimaskdino_r18w32_2k", "shapes/maskdino_r18"])
def settings(request: pytest.FixtureRequest) -> Config:
    return load_config(request.param, ["model.backbone.weights=null"])


@pytest.fixture(autouse=True)
def _autocast_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
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
            stages = detector(ImageBatch.from_images(batch()[0], GPU)).stages.values()
        # outside autocast, as evaluation does: there a product of two dtypes is an error
        masks = [stage.mask_logits() for stage in stages if stage.mask_embedding is not None]
        assert {mask.device.type for mask in masks} == {"cuda"}
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
        losses = criterion(predictions, targets, settings.loss, 8)
        assert losses.total.device.type == "cuda"
    assert sum(waits.lines.values()) == 1, waits.lines
    assert "match(" in next(iter(waits.lines))


def test_waiting_is_seen():
    with fake_gpu() as waits:
        x = torch.zeros(3, device=GPU)
        x + torch.tensor([1.0, 2.0, 3.0], device=GPU)  # from the host
        x[[0, 1]]  # the indices come from the host
        x.sum().to("cpu", non_blocking=True)
        x[x > 0]
        x[torch.zeros(2, dtype=torch.long, device=GPU)] = 1  # the number comes from the host
        x.prod(0)
    assert sum(waits.lines.values()) == 5
    with fake_gpu(), pytest.raises(RuntimeError, match="cuda"):
        torch.zeros(3, device=GPU) + torch.zeros(3)


def test_tf32_lasts_until_the_next_precision(precision):
    before = torch.get_float32_matmul_precision()
    try:
        with autocast(GPU, "tf32"):
            assert not torch.is_autocast_enabled("cuda")
        assert torch.get_float32_matmul_precision() == "high"  # for the backward pass
        with autocast(torch.device("cpu"), "tf32"):
            assert not torch.is_autocast_enabled("cpu")
        with autocast(GPU, precision):
            assert torch.is_autocast_enabled("cuda") == (precision == "bf16")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_frozen_backbone_keeps_bfloat16_for_the_backward_pass():
    """And nothing in float32: a ReLU after batch norm in float32 would keep twice the memory."""
    name = "coco/instance-segmentation/dimaskdino_r50_4scale_bs16_12ep"
    backbone = build_backbone(load_config(name, ["model.backbone.weights=null"]).model.backbone)
    kept: dict[int, torch.Tensor] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with fake_gpu():
        to_fake_gpu(backbone)
        own = {p.untyped_storage()._cdata for p in backbone.parameters()}
        pixels = torch.zeros(1, 3, 128, 128, device=GPU)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast(GPU, "bf16"):
            features = backbone(pixels)
        large = [x for key, x in kept.items() if key not in own and x.dim() == 4 and x.is_floating_point()]
        assert len(large) > 90
        assert {x.dtype for x in [*large, *features.values()]} == {torch.bfloat16}
