"""AP of every stage, in one pass over the data: where detection lags behind segmentation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dimaskdino.data.coco import CocoDataset, find_split
from dimaskdino.data.loading import batches, evaluation_loader
from dimaskdino.errors import UserError
from dimaskdino.evaluation.coco_ap import AveragePrecision, DetectionResults, average_precision, read_truth
from dimaskdino.modeling import ImageBatch, Predictions, Stage, postprocess
from dimaskdino.training.checkpoint import TrainedModel


@dataclass(frozen=True)
class StageAP:
    """Box and mask AP of one stage; no mask AP for the stages without masks."""

    box: AveragePrecision
    mask: AveragePrecision | None

    @property
    def imbalance(self) -> float | None:
        """`AP_mask − AP_box`, in points: above 0 detection lags behind segmentation."""
        if self.mask is None or self.mask.AP is None or self.box.AP is None:
            return None
        return self.mask.AP - self.box.AP


@dataclass(frozen=True)
class LayerwiseAP:
    """AP of the stages of one model on one split.

    Attributes:
        stages: by stage name, in the order of the model.
        images: how many images were evaluated.
        source: what was evaluated on what.
    """

    stages: dict[str, StageAP]
    images: int
    source: str

    @property
    def last(self) -> StageAP:
        return next(reversed(self.stages.values()))

    def first_and_last(self) -> dict[str, dict[str, float | None]]:
        """Box and mask AP of the first and of the last decoder layer, as in figure 1 of the paper.

        Raises:
            UserError: the first decoder layer was not evaluated.
        """
        if "decoder.1" not in self.stages:
            raise UserError(f"{self.source}: decoder.1 was not evaluated, only {', '.join(self.stages)}")
        chosen = {"first": self.stages["decoder.1"], "last": self.last}
        return {name: {"box": s.box.AP, "mask": s.mask.AP if s.mask else None} for name, s in chosen.items()}

    def table(self) -> str:
        """The numbers as text, one line a stage, in percent."""
        header = f"{'stage':<22}{'box AP':>8}{'mask AP':>9}{'mask-box':>10}{'box 50':>8}{'mask 50':>9}"
        lines = [header, "-" * len(header)]
        for name, stage in self.stages.items():
            mask = stage.mask
            cells = [stage.box.AP, mask and mask.AP, stage.imbalance, stage.box.AP50, mask and mask.AP50]
            widths, signs = (8, 9, 10, 8, 9), ("", "", "+", "", "")
            lines.append(f"{name:<22}" + "".join(_cell(c, w, s) for c, w, s in zip(cells, widths, signs, strict=True)))
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write as json; `LayerwiseAP.load` reads it."""
        stages = {
            name: {
                "box": stage.box.to_json(),
                "mask": stage.mask.to_json() if stage.mask else None,
                "imbalance": stage.imbalance,
            }
            for name, stage in self.stages.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"source": self.source, "images": self.images, "stages": stages}, indent=1))

    @classmethod
    def load(cls, path: Path) -> "LayerwiseAP":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or is something else.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            stages = {
                name: StageAP(
                    AveragePrecision(**stage["box"]), AveragePrecision(**stage["mask"]) if stage["mask"] else None
                )
                for name, stage in content["stages"].items()
            }
            return cls(stages, content["images"], content["source"])
        except OSError as error:
            raise UserError(f"no layer-wise AP at {path} ({error.strerror}); run the evaluation first") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a layer-wise AP of this kit ({error})") from None


def _cell(value: float | None, width: int, sign: str) -> str:
    return f"{'–':>{width}}" if value is None else f"{value:>{sign}{width}.1f}"


def evaluate_layers(
    model: TrainedModel,
    device: torch.device | str = "cpu",
    split: str | None = None,
    stages: Sequence[str] | None = None,
) -> LayerwiseAP:
    """Box and mask AP of the stages of a model.

    Args:
        model: what to evaluate; its configuration says on which data.
        device: where to run.
        split: the configuration's `data.val` if None.
        stages: names of the stages wanted, all if None; `["decoder.6"]` for the final predictions of six layers.

    Raises:
        UserError: an unknown stage, a model for another number of classes than the data, bad data.
    """
    annotations, _ = find_split(model.config.data.root, split or model.config.data.val)
    results = detect_layers(model, device, split, stages)
    truth = read_truth(annotations)
    scored = {
        name: StageAP(
            average_precision(truth, found.boxes, "box"),
            average_precision(truth, found.masks, "mask") if found.has_masks else None,
        )
        for name, found in results.items()
    }
    return LayerwiseAP(scored, len(truth.dataset["images"]), f"step {model.step}, {annotations}")


def detect_layers(
    model: TrainedModel,
    device: torch.device | str = "cpu",
    split: str | None = None,
    stages: Sequence[str] | None = None,
) -> dict[str, DetectionResults]:
    """The detections of the stages of a model on a split, by stage name; arguments and errors as `evaluate_layers`."""
    settings = model.config
    loader = evaluation_loader(settings, split)
    data: CocoDataset = loader.dataset  # type: ignore[attr-defined]
    if len(data.classes) != settings.model.classes:
        raise UserError(
            f"the model knows {settings.model.classes} classes, {data.annotations_file} has {len(data.classes)}"
        )
    results: dict[str, DetectionResults] = {}
    for batch in tqdm(batches(loader), f"evaluating {data.annotations_file.stem}", len(loader), mininterval=2):
        images = ImageBatch.from_images(batch.images, device)
        with torch.inference_mode():
            predictions = model.detector(images)
        for name, stage in chosen_stages(predictions, stages).items():
            found = postprocess(
                stage,
                images.sizes,
                images.padded_size,
                batch.original_sizes,
                settings.evaluation.detections,
            )
            stage_results = results.setdefault(name, DetectionResults(data.category_ids))
            for image_id, instances in zip(batch.image_ids, found, strict=True):
                stage_results.add(image_id, instances)
    return results


def chosen_stages(predictions: Predictions, names: Sequence[str] | None) -> dict[str, Stage]:
    """The stages of these names, in the order of the model; all if None.

    Raises:
        UserError: the model has no such stage.
    """
    for name in names or ():
        if name not in predictions.stages:
            raise UserError(f"the model has no stage '{name}'; it has {', '.join(predictions.stages)}")
    return {name: stage for name, stage in predictions.stages.items() if names is None or name in names}
