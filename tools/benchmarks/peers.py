"""Train Mask R-CNN (torchvision) or Mask2Former (transformers) on the kit's batches.

A peer gets the images, augmentation, batches, image sizes and backbone weights of a run of the kit. It is trained with
AdamW and scored by the same code. Its other modules start from random weights.
"""

import json
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, masks_to_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tyro.conf import Positional

from dimaskdino.config import Config, load_config
from dimaskdino.data.dataloader import (
    Batch,
    batches,
    evaluation_dataset,
    evaluation_loader,
    training_dataset,
    training_loader,
)
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.evaluation.detections import Detections
from dimaskdino.modeling import CroppedMasks, ImageBatch, Instances
from dimaskdino.modeling.backbone import ResNet, TimmBackbone, build_backbone
from dimaskdino.modeling.structures import PIXEL_MEAN, PIXEL_STD
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.threads import adaptive_threads
from tools.benchmarks.measuring import peak_memory_gib, save

Name = Literal["mask_rcnn", "mask2former"]
CLIP_NORM = 1.0  # largest norm of the gradient


class _Pyramid(nn.Module):
    """A backbone of the kit with a feature pyramid, as torchvision's detectors take it."""

    def __init__(self, settings: Config) -> None:
        super().__init__()
        channels = settings.model.hidden_dim
        self.backbone = build_backbone(settings.model.backbone)
        self.out_channels = channels
        self.pyramid = FeaturePyramidNetwork(list(self.backbone.channels.values()), channels, LastLevelMaxPool())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        features = self.backbone(pixels)
        return self.pyramid(OrderedDict((str(level), x) for level, x in enumerate(features.values())))


class MaskRCNNPeer(nn.Module):
    """torchvision's Mask R-CNN with the width of the kit's configuration, for images of a few hundred pixels.

    The heads learn from 64 proposals per image: with the default of 512 they take nearly all the time of a step.
    Anchors have half the default size.
    """

    def __init__(self, settings: Config) -> None:
        super().__init__()
        resize, width = settings.data.resize, settings.model.hidden_dim
        self.model = MaskRCNN(
            _Pyramid(settings),
            box_batch_size_per_image=64,
            rpn_post_nms_top_n_train=500,
            rpn_post_nms_top_n_test=300,
            num_classes=settings.model.classes + 1,  # and background
            min_size=resize.shortest,
            max_size=resize.longest,
            image_mean=[value / 255 for value in PIXEL_MEAN],
            image_std=[value / 255 for value in PIXEL_STD],
            rpn_anchor_generator=AnchorGenerator(tuple((16 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5),
            box_score_thresh=0.01,
            box_detections_per_img=settings.evaluation.detections,
        )
        self.model.roi_heads.mask_head = MaskRCNNHeads(width, (width,) * 4, 1)
        self.model.roi_heads.mask_predictor = MaskRCNNPredictor(width, width, settings.model.classes + 1)

    def losses(self, batch: Batch) -> Tensor:
        """The sum of the losses of proposals, boxes and masks."""
        targets = []
        for masks, labels, count in zip(batch.targets.masks, batch.targets.labels, batch.targets.counts, strict=True):
            boxes = masks_to_boxes(masks[:count])
            boxes[:, 2:] += 1  # behind the last pixel
            targets.append({"boxes": boxes, "labels": labels[:count] + 1, "masks": masks[:count]})
        return sum(self.model([image / 255 for image in batch.images], targets).values())

    def detect(self, batch: Batch, most: int) -> list[Instances]:
        """Its own post-processing, which pastes the masks into the image at its original size."""
        transform = self.model.transform
        paste = transform.postprocess
        sizes = [(image.shape[-2], image.shape[-1]) for image in batch.images]
        transform.postprocess = lambda result, *_: result  # the images were resized before
        try:
            found = self.model([image / 255 for image in batch.images])
        finally:
            transform.postprocess = paste
        return [
            Instances(
                result["boxes"],
                result["scores"],
                result["labels"] - 1,
                CroppedMasks.of(result["masks"][:, 0] > 0.5),
                torch.arange(len(result["scores"])),
            )
            for result in paste(found, sizes, batch.original_sizes)
        ]


class _Features(nn.Module):
    """A backbone of the kit as transformers' models take it."""

    def __init__(self, settings: Config) -> None:
        super().__init__()
        self.backbone = build_backbone(settings.model.backbone)

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(feature_maps=tuple(self.backbone(pixels).values()))


class Mask2FormerPeer(nn.Module):
    """transformers' Mask2Former with the widths, numbers of layers and of queries of the kit's configuration."""

    def __init__(self, settings: Config) -> None:
        super().__init__()
        try:
            from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig
        except ImportError:
            raise UserError("this peer needs transformers: pip install 'dimaskdino[peers]'") from None
        features, model = _Features(settings), settings.model
        stages = [f"stage{i}" for i in range(1, 5)]
        placeholder = ResNetConfig(
            hidden_sizes=list(features.backbone.channels.values()), depths=[1] * 4, out_features=stages
        )
        self.model = Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(
                backbone_config=placeholder,
                num_labels=model.classes,
                feature_size=model.hidden_dim,
                mask_feature_size=model.hidden_dim,
                hidden_dim=model.hidden_dim,
                num_attention_heads=model.heads,
                encoder_layers=model.pixel_decoder.layers,
                encoder_feedforward_dim=model.pixel_decoder.ffn_dim,
                decoder_layers=model.decoder.layers + 1,
                dim_feedforward=model.decoder.ffn_dim,
                num_queries=model.selection.k[-1],
                train_num_points=settings.loss.points,
            )
        )
        self.model.model.pixel_level_module.encoder = features

    def losses(self, batch: Batch) -> Tensor:
        """Its own loss over all decoder layers."""
        targets = batch.targets
        outputs = self.model(
            ImageBatch.from_images(batch.images).pixels,
            mask_labels=[masks[:n].float() for masks, n in zip(targets.masks, targets.counts, strict=True)],
            class_labels=[labels[:n] for labels, n in zip(targets.labels, targets.counts, strict=True)],
        )
        return outputs.loss.squeeze()

    def detect(self, batch: Batch, most: int) -> list[Instances]:
        """Instance segmentation as in the paper: class probability times the mean probability inside the mask."""
        images = ImageBatch.from_images(batch.images)
        outputs = self.model(images.pixels)
        results = []
        for logits, masks, size, original in zip(
            outputs.class_queries_logits, outputs.masks_queries_logits, images.sizes, batch.original_sizes, strict=True
        ):
            probabilities = logits.softmax(-1)[:, :-1]
            scores, pairs = probabilities.flatten().topk(min(most, probabilities.numel()))
            queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
            large = functional.interpolate(masks[None], images.padded_size, mode="bilinear", align_corners=False)
            large = large[..., : size[0], : size[1]]
            large = functional.interpolate(large, original, mode="bilinear", align_corners=False)[0]
            covered = large > 0
            quality = (large.sigmoid() * covered).sum((1, 2)) / (covered.sum((1, 2)) + 1e-6)
            boxes = torch.zeros(len(covered), 4)
            some = covered.flatten(1).any(1)
            boxes[some] = masks_to_boxes(covered[some]) + torch.tensor([0.0, 0, 1, 1])
            results.append(
                Instances(boxes[queries], scores * quality[queries], labels, CroppedMasks.of(covered), queries)
            )
        return results


Peer = MaskRCNNPeer | Mask2FormerPeer
PEERS: dict[Name, type[Peer]] = {"mask_rcnn": MaskRCNNPeer, "mask2former": Mask2FormerPeer}


def build_optimizer(peer: Peer, lr: float) -> torch.optim.Optimizer:
    """AdamW with a tenth of the learning rate for the backbone."""
    backbone = []
    for module in peer.modules():
        if isinstance(module, ResNet | TimmBackbone):
            backbone += module.parameters()
    known = set(map(id, backbone))
    rest = [p for p in peer.parameters() if id(p) not in known]
    groups = [{"params": rest, "lr": lr}, {"params": backbone, "lr": 0.1 * lr}]
    return torch.optim.AdamW(groups, weight_decay=0.05, fused=True)


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm-up over 100 steps, a tenth after 74 % and a hundredth after 91 % of the steps."""
    drops = (step >= steps * 2600 / 3500) + (step >= steps * 3200 / 3500)
    return min(1.0, (step + 1) / 100) * 0.1**drops


def step_of(peer: Peer, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Do one training step; returns the loss."""
    loss = peer.losses(batch)
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()}; use a lower --lr")
    loss.backward()
    nn.utils.clip_grad_norm_(peer.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def score(peer: Peer, settings: Config) -> dict[str, float | None]:
    """Box and mask AP on the validation split."""
    data = evaluation_dataset(settings)
    found: list[Detections] = []
    peer.eval()
    loader = evaluation_loader(data, settings, [range(len(data))])
    with torch.inference_mode():
        for batch in progress_bar(batches(loader), "evaluating", total=len(loader)):
            detected = peer.detect(batch, settings.evaluation.detections)
            for image_id, instances in zip(batch.image_ids, detected, strict=True):
                found.append(Detections.of(image_id, instances, data.category_ids))
    joined, truth = Detections.joined(found), read_truth(data.annotations_file)
    return {
        "box": average_precision(truth, joined.box_table, "box").AP,
        "mask": average_precision(truth, joined.masks, "mask").AP,
    }


def train(
    name: Positional[Name],
    run: Positional[str],
    folder: Positional[Path],
    steps: int,
    lr: float = 3e-4,
    seed: int = 0,
) -> None:
    """Train and score a peer; writes FOLDER/result.json and FOLDER/weights.pt.

    Example: python -m tools.benchmarks.peers mask_rcnn runs/mine build/mask_rcnn --steps 5000

    Args:
        name: The peer.
        run: Run folder or configuration of the kit, for data, sizes and backbone.
        folder: Folder to write to.
        steps: Number of training steps.
        lr: Learning rate; the backbone has a tenth of it.
        seed: Of weights and data.
    """
    settings = load_config(run, [f"schedule.steps={steps}", f"train.seed={seed}"])
    torch.manual_seed(seed)
    peer = PEERS[name](settings).train()
    optimizer = build_optimizer(peer, lr)
    initial = [group["lr"] for group in optimizer.param_groups]
    loader = training_loader(training_dataset(settings), settings, 0, 0, 1)
    started, losses = time.perf_counter(), []
    bar = progress_bar(description=name, total=steps, log_by_hand=True)
    for step, batch in enumerate(batches(loader)):
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * learning_rate_factor(step, steps)
        with adaptive_threads():
            losses.append(step_of(peer, optimizer, batch))
        bar.update()
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
    bar.close()
    result = {
        "model": name,
        "backbone": settings.model.backbone.name,
        "steps": steps,
        "batch": settings.train.batch_size,
        "size": settings.data.jitter.size,
        "seed": seed,
        "lr": lr,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "parameters": sum(p.numel() for p in peer.parameters()),
        "peak_memory": int(peak_memory_gib() * 2**30),
        **score(peer, settings),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save(result, folder / "result.json")
    torch.save(peer.state_dict(), folder / "weights.pt")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(train)
