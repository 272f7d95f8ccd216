"""Losses against the recorded mean and spread of the published implementation."""

import numpy as np
import pytest
import torch
from golden import MODELS, detector, image, read
from torch.nn import functional
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from dimaskdino import config
from dimaskdino.modeling import ImageBatch, Stage, Targets
from dimaskdino.training.criterion import criterion, denoising_matches, stage_losses
from dimaskdino.training.matcher import Matches, match

SEEDS = 40
TERMS = {"ce": "label", "mask": "mask", "dice": "dice", "bbox": "l1", "giou": "giou"}


def our_key(published: str, last: int) -> str:
    """`loss_mask_dn_2` -> `denoising.decoder.2/mask`, and so on for all forms listed in the golden README."""
    interaction = published.startswith("oldm_")
    parts = published.removeprefix("oldm_").removeprefix("loss_").split("_")
    term = TERMS[parts[0]]
    suffix = parts[1:]
    if interaction:
        return f"token_interaction.{suffix[-1]}/{term}"
    if "interm" in suffix:
        return f"first_selection/{term}"
    denoising = "denoising." if "dn" in suffix else ""
    number = next((s for s in suffix if s.isdigit()), str(last))
    return f"{denoising}decoder.{number}/{term}"


def recorded_targets(record: dict) -> Targets:
    height, width = record["image_size"]
    objects = record["targets"]
    M = max(map(len, objects))
    labels, boxes = torch.zeros(len(objects), M, dtype=torch.long), torch.zeros(len(objects), M, 4)
    masks = torch.zeros(len(objects), M, height, width, dtype=torch.uint8)
    yy, xx = np.mgrid[0:height, 0:width] + 0.5
    for b, ellipses in enumerate(objects):
        for j, e in enumerate(ellipses):
            mask = ((xx - e["cx"]) / e["rx"]) ** 2 + ((yy - e["cy"]) / e["ry"]) ** 2 <= 1
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x0, x1, y0, y1 = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
            labels[b, j] = e["class"]
            boxes[b, j] = torch.tensor(
                [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
            )
            masks[b, j] = torch.from_numpy(mask)
    return Targets(labels, boxes, masks, tuple(map(len, objects)))


@pytest.mark.slow
def test_weighted_losses_over_seeds():
    record = read("loss_small")
    model = detector("loss_small").train()
    settings = config.Loss(points=record["options"]["MODEL.MaskDINO.TRAIN_NUM_POINTS"])
    images = ImageBatch.from_images([image(*record["image_size"], seed) for seed in record["image_seeds"]])
    targets = recorded_targets(record)
    runs: list[dict[str, float]] = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        with torch.no_grad():
            losses = criterion(model(images, targets), targets, settings, objects=sum(targets.counts))
        runs.append({key: float(value) for key, value in losses.terms.items()})

    last = MODELS["loss_small"].decoder.layers
    expected = {our_key(key, last): value for key, value in record["weighted_losses"].items()}
    assert set(expected) == set(runs[0])
    assert len(expected) == 51
    for key, wanted in expected.items():
        values = np.array([run[key] for run in runs])
        if wanted["std"] == 0:
            np.testing.assert_allclose(values, wanted["mean"], rtol=1e-4, err_msg=key)
        else:
            error = wanted["std"] / np.sqrt(SEEDS)
            assert abs(values.mean() - wanted["mean"]) <= 4 * error + 0.01 * abs(wanted["mean"]), key


def slow_losses(stage: Stage, matches: Matches, targets: Targets) -> dict[str, torch.Tensor]:
    """One stage's losses, object by object, masks compared at every pixel instead of at points."""
    losses = dict.fromkeys(("label", "l1", "giou", "mask", "dice"), torch.tensor(0.0))
    wanted_labels = torch.zeros_like(stage.class_logits)
    for b, q, t in zip(matches.image.tolist(), matches.query.tolist(), matches.target.tolist(), strict=True):
        box, wanted = stage.boxes[b, q], targets.boxes[b, t]
        wanted_labels[b, q, targets.labels[b, t]] = 1
        losses["l1"] = losses["l1"] + (box - wanted).abs().sum()
        corners = [box_convert(x[None], "cxcywh", "xyxy") for x in (box, wanted)]
        losses["giou"] = losses["giou"] + 1 - generalized_box_iou(*corners)[0, 0]
        if stage.has_masks:
            logits = stage.mask_logits()[b, q][None, None]
            x = functional.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[0, 0]
            mask, p = targets.masks[b, t].float(), x.sigmoid()
            losses["mask"] = losses["mask"] + functional.binary_cross_entropy_with_logits(x, mask)
            # the published "+ 1" is made for 12544 points, not for all pixels
            scale = 12544 / mask.numel()
            overlap, total = scale * (p * mask).sum(), scale * (p.sum() + mask.sum())
            losses["dice"] = losses["dice"] + 1 - (2 * overlap + 1) / (total + 1)
    focal = sigmoid_focal_loss(stage.class_logits, wanted_labels, alpha=0.25, gamma=2, reduction="sum")
    return losses | {"label": focal}


@torch.no_grad()
def test_stages_judged_together_have_the_losses_of_each():
    model = detector("loss_small").train()
    record = read("loss_small")
    images = ImageBatch.from_images([image(*record["image_size"], seed) for seed in record["image_seeds"]])
    targets = recorded_targets(record)
    settings = config.Loss(uncertain_fraction=0.0)
    torch.manual_seed(0)
    predictions = model(images, targets)
    stages = list(predictions.stages.values())
    judged = list(zip(stages, match(stages, targets, settings), strict=True))
    restored = denoising_matches(targets, predictions.denoising_groups)
    judged += [(stage, restored) for stage in predictions.denoising.values()]
    for (stage, matches), found in zip(judged, stage_losses(judged, targets, settings), strict=True):
        expected = slow_losses(stage, matches, targets)
        for term in ("label", "l1", "giou"):
            torch.testing.assert_close(found[term], expected[term], rtol=1e-4, atol=1e-4, msg=f"{stage.name} {term}")
        assert ("mask" in found) == stage.has_masks
        if stage.has_masks:
            torch.testing.assert_close(found["mask"], expected["mask"], rtol=0.02, atol=0)
            torch.testing.assert_close(found["dice"], expected["dice"], rtol=0.02, atol=0)
