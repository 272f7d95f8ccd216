"""AP of every stage in one pass over the data, and the imbalance between boxes and masks."""

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from dimaskdino.checkpoints.model_files import TrainedModel
from dimaskdino.data.check import record_faults
from dimaskdino.data.coco import find_split
from dimaskdino.data.dataloader import (
    Batch,
    batches,
    equally_padded,
    evaluation_dataset,
    evaluation_loader,
    explaining_dead_workers,
)
from dimaskdino.evaluation.coco_ap import COCO_DETECTIONS, AveragePrecision, Truth, average_precision, read_truth
from dimaskdino.evaluation.detections import Detections, DetectionStore, file_digest, fingerprint, state_digest
from dimaskdino.evaluation.upper_bounds import UpperBounds, upper_bounds
from dimaskdino.modeling import ImageBatch, Predictions, Stage, postprocess
from dimaskdino.modeling.stages import FIRST_LAYER
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import require_regular, write_text
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.terminal import print_lines, printable
from dimaskdino.utils.threads import adaptive_threads

_AP = TypeAdapter(AveragePrecision)


@dataclass(frozen=True)
class StageAP:
    """Box and mask AP of one stage; no mask AP for the stages without masks."""

    box: AveragePrecision
    mask: AveragePrecision | None

    @property
    def imbalance(self) -> float | None:
        """`AP_mask − AP_box` in points; above 0, masks score higher than boxes."""
        if self.mask is None or self.mask.AP is None or self.box.AP is None:
            return None
        return self.mask.AP - self.box.AP


@dataclass(frozen=True)
class LayerwiseAP:
    """AP of the stages of one model on one split.

    Attributes:
        stages: by stage name, in the order of the model.
        images: number of evaluated images.
        source: which model was evaluated on which data, for people.
        upper_bounds: upper bounds on AP at the model's resolution; None in files written before version 0.2.
        all_detections: box and mask AP of the last stage with all its detections, where an image has more objects of a
            class than the 100 detections that COCO counts; None otherwise.
    """

    stages: dict[str, StageAP]
    images: int
    source: str
    upper_bounds: UpperBounds | None = None
    all_detections: dict[str, float | None] | None = None

    @property
    def last(self) -> StageAP:
        return next(reversed(self.stages.values()))

    @property
    def remarks(self) -> list[str]:
        """Warnings of a probably faulty evaluation; usually none."""
        box = self.last.box.AP
        if box is None:
            return ["there is no annotated object, so AP is not defined"]
        if box == 0:
            return ["no detection matches an object: is the model trained, and are its classes those of the data?"]
        if self.all_detections is not None:
            box_AP, mask_AP = (show_ap(self.all_detections[kind]) for kind in ("box", "mask"))
            return [
                f"AP is COCO's, which counts {COCO_DETECTIONS} detections per image and class, and an image has more "
                "objects of a class; with all detections of the last stage (evaluation.detections per image) box AP is "
                f"{box_AP}, mask AP {mask_AP}"
            ]
        return []

    def relative_imbalance(self, stage: str) -> float | None:
        """The imbalance of a stage with both APs as fractions of their upper bounds, in percentage points.

            100 · (AP_mask / bound_mask − AP_box / bound_box)

        Above 0, the imbalance is larger than the resolution and boxes computed from masks explain. None without upper
        bounds or where an AP is not defined.
        """
        found = self.stages[stage]
        if self.upper_bounds is None or found.mask is None or found.mask.AP is None or found.box.AP is None:
            return None
        of_boxes = self.upper_bounds.of_boxes(stage)
        bound_box = 100.0 if of_boxes is None else of_boxes.mean
        bound_mask = self.upper_bounds.mask.mean
        if not bound_mask or not bound_box:
            return None
        return 100 * (found.mask.AP / bound_mask - found.box.AP / bound_box)

    def first_and_last(self) -> dict[str, dict[str, float | None]]:
        """Box and mask AP of the first and the last decoder layer, as in figure 1 of the paper.

        Raises:
            UserError: the first decoder layer was not evaluated.
        """
        if FIRST_LAYER not in self.stages:
            raise UserError(f"{self.source}: {FIRST_LAYER} was not evaluated, only {', '.join(self.stages)}")
        found = {}
        for name, stage in (("first", self.stages[FIRST_LAYER]), ("last", self.last)):
            found[name] = {"box": stage.box.AP, "mask": stage.mask.AP if stage.mask else None}
        return found

    def table(self) -> str:
        """The numbers as text, one line per stage, in percent."""
        header = f"{'stage':<22}{'box AP':>8}{'mask AP':>9}{'imbalance':>11}{'box 50':>8}{'mask 50':>9}"
        lines = [header, "-" * len(header)]
        for name, stage in self.stages.items():
            box, mask, imbalance = self._cells(stage)
            box_50, mask_50 = show_ap(stage.box.AP50), show_ap(stage.mask.AP50 if stage.mask else None)
            lines.append(f"{printable(name):<22}{box:>8}{mask:>9}{imbalance:>11}{box_50:>8}{mask_50:>9}")
        return "\n".join(lines)

    def markdown(self) -> str:
        """Box and mask AP as a Markdown table, one row per stage, in percent."""
        lines = ["| stage | box AP | mask AP | imbalance |", "|---|---|---|---|"]
        for name, stage in self.stages.items():
            box, mask, imbalance = self._cells(stage)
            lines.append(f"| {name} | {box} | {mask} | {imbalance} |")
        return "\n".join(lines)

    @staticmethod
    def _cells(stage: StageAP) -> tuple[str, str, str]:
        return show_ap(stage.box.AP), show_ap(stage.mask.AP if stage.mask else None), show_ap(stage.imbalance, "+")

    def to_json(self) -> dict[str, Any]:
        stages = {name: asdict(stage) | {"imbalance": stage.imbalance} for name, stage in self.stages.items()}
        content = {"source": self.source, "images": self.images, "stages": stages}
        if self.upper_bounds is not None:
            content["ceilings"] = asdict(self.upper_bounds)  # the key in the files of all versions
        if self.all_detections is not None:
            content["all_detections"] = self.all_detections
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "LayerwiseAP":
        """Read what `to_json` returned. Other content raises a KeyError, TypeError, ValueError or AttributeError."""
        stages = {}
        for name, stage in content["stages"].items():
            mask = _AP.validate_python(stage["mask"]) if stage["mask"] else None
            stages[name] = StageAP(_AP.validate_python(stage["box"]), mask)
        limits = UpperBounds.from_json(content["ceilings"]) if "ceilings" in content else None
        return cls(stages, content["images"], content["source"], limits, content.get("all_detections"))

    def save(self, path: Path) -> None:
        """Write as json; `LayerwiseAP.load` reads it.

        Raises:
            UserError: the file cannot be written.
        """
        write_text(path, json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: Path) -> "LayerwiseAP":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or is something else.
        """
        require_regular(path)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"no layer-wise AP at {path} ({error.strerror}); run the evaluation first") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a layer-wise AP of this kit ({first_line(error)})") from None


def show_ap(ap: float | None, sign: Literal["", "+"] = "") -> str:
    """AP, or with "+" a difference, with one decimal; a dash where it is not defined."""
    return "–" if ap is None else f"{ap:{sign}.1f}"


def evaluate_layers(
    model: TrainedModel,
    split: str | None = None,
    stages: Sequence[str] | None = None,
    folder: Path | None = None,
) -> LayerwiseAP:
    """Box and mask AP of the stages of a model.

    Args:
        model: the model. It is evaluated on the data of its configuration, on its device.
        split: the split to evaluate on; `data.val` of the configuration by default.
        stages: names of the stages to evaluate, such as `["decoder.6"]`; all by default.
        folder: folder for the detections, so that an interrupted evaluation resumes; temporary by default.

    Raises:
        UserError: a stage is unknown, the model has another number of classes than the data, or the data are unusable.
    """
    by_stage = detect_layers(model, split, stages, folder)
    truth, source = truth_of(model, split)
    return score_layers(by_stage, truth, source, upper_bounds(truth, model.config))


def truth_of(model: TrainedModel, split: str | None = None) -> tuple[Truth, str]:
    """The annotations that a model is evaluated on, and the `source` of the result."""
    file, _ = find_split(model.config.data.root, split or model.config.data.val)
    return read_truth(file), f"step {model.step}, {file}"


def score_layers(
    by_stage: Mapping[str, Detections], truth: Truth, source: str, limits: UpperBounds | None = None
) -> LayerwiseAP:
    """Box and mask AP of the detections of each stage.

    Args:
        by_stage: detections by stage name; a `DetectionStore` keeps one stage in memory at a time.
        truth: the annotations, from `read_truth`.
        source: which model was evaluated on which data, for people.
        limits: upper bounds to store with the result.
    """
    scored = {}
    for name in progress_bar(by_stage, "scoring"):
        detections = by_stage[name]
        box = average_precision(truth, detections.results("box"), "box")
        mask = average_precision(truth, detections.results("mask"), "mask") if detections.has_masks else None
        scored[name] = StageAP(box, mask)
    every = None
    if truth.most_objects > COCO_DETECTIONS:
        most = len(detections)
        every = {"box": average_precision(truth, detections.results("box"), "box", most).AP, "mask": None}
        if detections.has_masks:
            every["mask"] = average_precision(truth, detections.results("mask"), "mask", most).AP
    return LayerwiseAP(scored, len(truth.dataset["images"]), source, limits, every)


def detect_layers(
    model: TrainedModel,
    split: str | None = None,
    stages: Sequence[str] | None = None,
    folder: Path | None = None,
    shard: tuple[int, int] = (0, 1),
) -> DetectionStore:
    """Detections of the stages of a model on a split, by stage name.

    Arguments and errors are those of `evaluate_layers`.

    Args:
        model: the model.
        split: the split; `data.val` of the configuration by default.
        stages: names of the stages; all by default.
        folder: folder for the detections; existing parts are not computed again.
        shard: (i, n): this process is number i of n that fill the folder together, and computes only its parts.
    """
    settings = model.config
    data = evaluation_dataset(settings, split)
    data.use_classes(model.classes, settings.data)
    if shard[0] == 0:
        for line in data.annotations.remarks + record_faults(data.annotations):
            print_lines(f"note: {line}", file=sys.stderr)
    about = {
        "weights": fingerprint(model),
        "model": settings.model.model_dump(mode="json"),
        "precision": model.precision,
        "annotations": file_digest(data.annotations_file),
        "images": str(data.image_folder.resolve()),
        "image files": state_digest(data.image_folder / image["file_name"] for image in data.images),
        "plugins": plugins.hashes(),
        "device": model.device.type,
        "batch size": settings.evaluation.batch_size,
        "resize": settings.data.resize.model_dump(mode="json"),
        "detections": settings.evaluation.detections,
        "categories": data.category_ids,
        "stages": list(stages) if stages else None,
    }
    store = DetectionStore(folder, about, len(data), first=shard[0] == 0)
    missing = store.missing(shard)
    groups = [group for part in missing for group in equally_padded(data, store.images_of(part), settings)]
    loader = evaluation_loader(data, settings, groups)
    images_left = sum(len(store.images_of(part)) for part in missing)
    title = f"evaluating {data.annotations_file.stem}"
    with (
        contextlib.closing(batches(loader)) as loaded,
        explaining_dead_workers(),
        progress_bar(total=images_left, description=title, unit="images") as progress,
    ):
        for part in missing:
            detections: dict[str, list[Detections]] = defaultdict(list)
            images = len(store.images_of(part))
            while images:
                batch = next(loaded)
                for name, found in detect_batch(model, batch, stages, data.category_ids).items():
                    detections[name].extend(found)
                images -= len(batch.images)
                progress.update(len(batch.images))
            store.write(part, detections)
    return store


@adaptive_threads()
def detect_batch(
    model: TrainedModel,
    batch: Batch,
    stages: Sequence[str] | None,
    category_ids: Sequence[int],
) -> dict[str, list[Detections]]:
    """Detections in each image of a batch, at its original size, by stage.

    Args:
        model: the model.
        batch: images from `evaluation_loader`.
        stages: names of the stages; all if None.
        category_ids: the dataset's category id of each label.
    """
    images = ImageBatch.from_images(batch.images, model.device)
    predictions = model.forward(images)
    count = model.config.evaluation.detections
    detections: dict[str, list[Detections]] = {}
    for name, stage in chosen_stages(predictions, stages).items():
        found = postprocess(stage, images.sizes, images.padded_size, batch.original_sizes, count)
        detections[name] = []
        for image_id, instances in zip(batch.image_ids, found, strict=True):
            detections[name].append(Detections.of(image_id, instances, category_ids))
    return detections


def chosen_stages(predictions: Predictions, names: Sequence[str] | None) -> dict[str, Stage]:
    """The stages with these names, in the order of the model; all if None.

    Raises:
        UserError: the model has no such stage.
    """
    for name in names or ():
        if name not in predictions.stages:
            raise UserError(f"the model has no stage '{name}'; it has {', '.join(predictions.stages)}")
    return {name: stage for name, stage in predictions.stages.items() if names is None or name in names}
