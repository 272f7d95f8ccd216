"""Scoring of the last and chosen stages during a training, and an average of the weights."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from dimaskdino.checkpoints.model_files import TrainedModel
from dimaskdino.config import Config
from dimaskdino.data.coco import Record
from dimaskdino.data.dataloader import batches, equally_padded, evaluation_dataset, evaluation_loader
from dimaskdino.data.painting import paint_beside_truth
from dimaskdino.evaluation.coco_ap import average_precision, read_truth
from dimaskdino.evaluation.detections import Detections
from dimaskdino.evaluation.layerwise_ap import detect_batch
from dimaskdino.evaluation.predict import predict_images
from dimaskdino.modeling import Detector
from dimaskdino.modeling.stages import last_layer
from dimaskdino.utils.distributed import DistributedContext

PICTURES = 4  # images per validation
PICTURE_THRESHOLD = 0.3
PICTURE_WIDTH = 1000  # pixels


class Validator:
    """Box and mask AP of the last and chosen stages on images that are spread evenly over the validation split.

    Args:
        config: all settings; `train.validation.images` bounds the time and memory.
        context: the processes, which share the images.
        classes: names of the classes that are trained.

    Raises:
        UserError: the split cannot be used, or has other classes.
    """

    def __init__(self, config: Config, context: DistributedContext, classes: Sequence[str]) -> None:
        self.config, self.context = config, context
        self.data = evaluation_dataset(config)
        self.data.use_classes(classes, config.data)
        count = min(config.train.validation.images, len(self.data))
        self.positions = [len(self.data) * i // count for i in range(count)]
        self.plain = copy.copy(self.data)  # at the images' own size, with their objects
        self.plain.transform = Record.sample
        self.truth = read_truth(self.data.annotations_file, [self.data.images[p]["id"] for p in self.positions])

    def score(self, detector: Detector) -> dict[str, Any]:
        """Score a detector, whose mode and weights stay as they are.

        Returns:
            `box_AP` and `mask_AP` of the last stage, the number of `images`, and with `train.validation.stages`
            `stages`: the `box` and `mask` AP of each by its name, None for those without masks.

        Raises:
            UserError: the model has no such stage.
        """
        chosen = [*self.config.train.validation.stages, self.last]
        own = self.positions[self.context.rank :: self.context.world_size]
        found: dict[str, list[Detections]] = {name: [] for name in chosen}
        with self._model(detector) as model:
            groups = equally_padded(self.data, own, self.config)
            for batch in batches(evaluation_loader(self.data, self.config, groups)):
                for name, detections in detect_batch(model, batch, chosen, self.data.category_ids).items():
                    found[name] += detections
        scores = {name: self._average_precision(detections) for name, detections in found.items()}
        last = scores.pop(self.last)
        result = {"box_AP": last["box"] or 0.0, "mask_AP": last["mask"] or 0.0, "images": len(self.positions)}
        return result | ({"stages": scores} if scores else {})

    def _average_precision(self, own: Sequence[Detections]) -> dict[str, float | None]:
        """Box and mask AP of all processes' detections; None without masks, or without objects."""
        parts = [part for part in self.context.gather(Detections.joined(own) if own else None) if part]
        detections = Detections.joined(parts)
        box = average_precision(self.truth, detections.box_table, "box").AP
        return {
            "box": box,
            "mask": average_precision(self.truth, detections.masks, "mask").AP if detections.has_masks else None,
        }

    def picture(self, detector: Detector) -> UInt8[np.ndarray, "h w 3"]:
        """A few validation images with their objects on the left and with detections on the right."""
        chosen = self.positions[:: max(1, len(self.positions) // PICTURES)][:PICTURES]
        samples = [self.plain[position] for position in chosen]
        with self._model(detector) as model:
            images = [sample.image for sample in samples]
            found = [
                each[self.last] for each in predict_images(model, images, [self.last], threshold=PICTURE_THRESHOLD)
            ]
        return paint_beside_truth(samples, found, self.data.classes, PICTURE_WIDTH)

    @property
    def last(self) -> str:
        """Name of the last stage."""
        return last_layer(self.config.model)

    @contextlib.contextmanager
    def _model(self, detector: Detector) -> Iterator[TrainedModel]:
        was_training = detector.training
        detector.eval()
        try:
            yield TrainedModel(detector, self.config, self.data.classes, 0, self.config.train.precision)
        finally:
            detector.train(was_training)


@dataclass
class Best:
    """The best validation so far: part of a resume point, so that a resumed run goes on as an undisturbed one.

    Attributes:
        score: the mean of its box and mask AP.
        step: of that validation; 0 before the first.
        without_better: number of validations since then.
    """

    score: float = -1.0
    step: int = 0
    without_better: int = 0

    def update(self, result: dict[str, Any], step: int) -> bool:
        """Count a validation; whether it is the best so far."""
        score = (result["box_AP"] + result["mask_AP"]) / 2
        if score > self.score:
            self.score, self.step, self.without_better = score, step, 0
            return True
        self.without_better += 1
        return False


def averaged(detector: Detector, decay: float) -> AveragedModel:
    """An exponential moving average of a detector's weights: θ̄ ← d·θ̄ + (1 − d)·θ after every step.

    The decay d rises to its value as min(decay, (1 + t) / (10 + t)) with the number t of steps, so that an early
    average does not remember the random start. Statistics of batch norm are the detector's, which are averages already.
    """

    @torch.no_grad()
    def average(means: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
        t = int(count)
        torch._foreach_lerp_(list(means), list(values), 1 - min(decay, (1 + t) / (10 + t)))

    return AveragedModel(detector, multi_avg_fn=average)
