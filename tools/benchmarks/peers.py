"""Other models on the same photographs: torchvision's Mask R-CNN and transformers' Mask2Former.

    python -m tools.benchmarks.peers time RUN
    python -m tools.benchmarks.peers train mask_rcnn RUN FOLDER --steps 5000

`RUN` is a run folder of the kit, or a configuration. A peer gets its images, augmentation, batches, image sizes, and
backbone with the same weights; it learns with AdamW, and the same code scores it. Its other modules start from random
numbers. `time` measures a training step of each model in turns, which gives the number of steps that fit into the same
time.
"""

import json
import resource
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
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
from dimaskdino.modeling import Detector, ImageBatch, Instances
from dimaskdino.modeling.backbone import ResNet, TimmBackbone, build_backbone
from dimaskdino.modeling.structures import PIXEL_MEAN, PIXEL_STD
from dimaskdino.training.criterion import criterion
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.threads import adaptive_threads
from tools.benchmarks.record import save

Name = Literal["mask_rcnn", "mask2former"]
TIMED_STEPS, ROUNDS = 5, 4


class Peer(nn.Module, ABC):
    """Another model, with the kit's batches."""

    @abstractmethod
    def losses(self, batch: Batch) -> Tensor:
        """The sum of its losses in training mode."""

    @abstractmethod
    def detect(self, batch: Batch, most: int) -> list[Instances]:
        """At most `most` detections in each image, at its original size, in evaluation mode."""


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


class MaskRCNNPeer(Peer):
    """torchvision's Mask R-CNN with the width of the kit's configuration, for images of a few hundred pixels.

    By default a step spends nearly all its time in the heads, which learn from 512 proposals per image. Here they are
    64, and anchors have half the usual size.
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
                result["masks"][:, 0] > 0.5,
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


class Mask2FormerPeer(Peer):
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
            results.append(Instances(boxes[queries], scores * quality[queries], labels, covered, queries))
        return results


PEERS: dict[str, Callable[[Config], Peer]] = {"mask_rcnn": MaskRCNNPeer, "mask2former": Mask2FormerPeer}


class _Kit(nn.Module):
    """The kit's model, for timing beside the peers."""

    def __init__(self, settings: Config) -> None:
        super().__init__()
        self.settings, self.detector = settings, Detector(settings.model)

    def losses(self, batch: Batch) -> Tensor:
        predictions = self.detector(ImageBatch.from_images(batch.images), batch.targets)
        objects = torch.tensor(float(sum(batch.targets.counts)))
        return criterion(predictions, batch.targets, self.settings.loss, objects).total


@dataclass(frozen=True)
class Recipe:
    """How a peer is trained: AdamW with a tenth of the rate for the backbone, warm-up, and two drops of the rate.

    Attributes:
        lr: learning rate.
        clip_norm: largest norm of the gradient.
        seed: of weights and data.
    """

    lr: float = 3e-4
    clip_norm: float = 1.0
    seed: int = 0

    def optimizer(self, peer: nn.Module) -> torch.optim.Optimizer:
        backbones = [module for module in peer.modules() if isinstance(module, ResNet | TimmBackbone)]
        backbone = [parameter for module in backbones for parameter in module.parameters()]
        known = set(map(id, backbone))
        rest = [p for p in peer.parameters() if id(p) not in known]
        groups = [{"params": rest, "lr": self.lr}, {"params": backbone, "lr": 0.1 * self.lr}]
        return torch.optim.AdamW(groups, weight_decay=0.05, fused=True)

    def factor(self, step: int, steps: int) -> float:
        """Of the learning rate: warm-up over 100 steps, a tenth after 74 %, a hundredth after 91 % of the steps."""
        drops = sum(step >= share * steps for share in (2600 / 3500, 3200 / 3500))
        return min(1.0, (step + 1) / 100) * 0.1**drops


USUAL = Recipe()


def step_of(peer: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, clip_norm: float) -> float:
    """One training step; returns the loss."""
    loss = peer.losses(batch)
    if not loss.isfinite():
        raise UserError(f"the loss is {loss.item()}; take a lower --lr")
    loss.backward()
    nn.utils.clip_grad_norm_(peer.parameters(), clip_norm)
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
            for image_id, instances in zip(
                batch.image_ids, peer.detect(batch, settings.evaluation.detections), strict=True
            ):
                found.append(Detections.of(image_id, instances, data.category_ids))
    joined, truth = Detections.joined(found), read_truth(data.annotations_file)
    return {
        "box": average_precision(truth, joined.box_table, "box").AP,
        "mask": average_precision(truth, joined.masks, "mask").AP,
    }


def train(
    name: Positional[Name], run: Positional[str], folder: Positional[Path], steps: int, recipe: Recipe = USUAL
) -> None:
    """Train and score a peer; writes FOLDER/result.json and its weights.

    Args:
        name: the peer.
        run: run folder or configuration of the kit, for data, sizes and backbone.
        folder: folder to make.
        steps: number of training steps.
        recipe: how it is trained.
    """
    config = load_config(run)
    schedule = config.schedule.model_copy(update={"steps": steps})
    settings = config.model_copy(
        update={"schedule": schedule, "train": config.train.model_copy(update={"seed": recipe.seed})}
    )
    torch.manual_seed(recipe.seed)
    peer = PEERS[name](settings).train()
    optimizer = recipe.optimizer(peer)
    rates = [group["lr"] for group in optimizer.param_groups]
    data = training_dataset(settings)
    loader = training_loader(data, settings, 0, 0, 1)
    started, losses = time.perf_counter(), []
    bar = progress_bar(description=name, total=steps, log_by_hand=True)
    for step, batch in enumerate(batches(loader)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.factor(step, steps)
        with adaptive_threads():
            losses.append(step_of(peer, optimizer, batch, recipe.clip_norm))
        bar.update()
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
    bar.close()
    minutes = (time.perf_counter() - started) / 60
    result = {
        "model": name,
        "backbone": settings.model.backbone.name,
        "steps": steps,
        "batch": settings.train.batch_size,
        "size": settings.data.jitter.size,
        "seed": recipe.seed,
        "lr": recipe.lr,
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in peer.parameters()),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **score(peer, settings),
    }
    save(result, folder / "result.json")
    torch.save(peer.state_dict(), folder / "weights.pt")
    print(json.dumps(result, indent=1))


def _model(name: str, settings: Config) -> nn.Module:
    return (_Kit(settings) if name == "kit" else PEERS[name](settings)).train()


def _some_batches(settings: Config) -> list[Batch]:
    source = batches(training_loader(training_dataset(settings), settings, 0, 0, 1))
    chosen = [next(source) for _ in range(TIMED_STEPS)]
    source.close()
    return chosen


def memory(name: Positional[str], run: Positional[str]) -> None:
    """Print the bytes that a process holds at most in some training steps of a model.

    Args:
        name: the peer, or `kit`.
        run: run folder or configuration of the kit.
    """
    settings = load_config(run)
    model = _model(name, settings)
    optimizer = USUAL.optimizer(model)
    for batch in _some_batches(settings):
        step_of(model, optimizer, batch, USUAL.clip_norm)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _memory_of(name: str, run: str) -> int:
    command = [sys.executable, "-m", "tools.benchmarks.peers", "memory", name, run]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def measure(
    run: Positional[str], names: Sequence[Name] = ("mask_rcnn", "mask2former"), output: Path | None = None
) -> None:
    """Time a training step of the kit's model and of each peer, in turns on the same batches, and measure memory.

    Args:
        run: run folder or configuration of the kit.
        names: the peers.
        output: json file to write.
    """
    settings = load_config(run)
    # first: a process inherits the peak of the one that started it, which is small as long as it has no models
    memory_of = {name: _memory_of(name, run) for name in ("kit", *names)}
    models = {name: _model(name, settings) for name in ("kit", *names)}
    optimizers = {name: USUAL.optimizer(model) for name, model in models.items()}
    chosen = _some_batches(settings)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            for batch in chosen:
                started = time.perf_counter()
                step_of(model, optimizers[name], batch, 0.1)
                if number:  # the first round prepares kernels
                    seconds[name].append(time.perf_counter() - started)
    result = {
        "seconds": {name: median(values) for name, values in seconds.items()},
        "peak_memory": memory_of,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "batch": settings.train.batch_size,
        "size": settings.data.jitter.size,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    save(result, output)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "time": measure, "memory": memory})
