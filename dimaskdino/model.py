"""The public interface: load a model, predict on images, inspect, save and upload."""

import functools
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from dimaskdino.checkpoints import TrainedModel, load_checkpoint, save_model
from dimaskdino.checkpoints.catalogue import training_data
from dimaskdino.checkpoints.model_files import MODEL
from dimaskdino.config import Config, shared_config
from dimaskdino.data.coco import Sample, encode_masks
from dimaskdino.data.images import SUFFIXES, ImageInput, to_image_tensor
from dimaskdino.data.painting import paint_instances
from dimaskdino.evaluation.layerwise_ap import LayerwiseAP
from dimaskdino.evaluation.predict import predict_images
from dimaskdino.inspection.look import Look, look_at
from dimaskdino.interop import hub
from dimaskdino.modeling import Instances
from dimaskdino.modeling.precision import Precision, fast_precision
from dimaskdino.modeling.stages import stage_names
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import refuse_existing, write_atomically, write_text
from dimaskdino.utils.markdown import escape
from dimaskdino.utils.plugins import allow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Result:
    """The detections in one image, in the order of their scores. A notebook shows it as a picture.

    Attributes:
        image: (3, h, w) uint8, RGB.
        instances: the detections.
        classes: names of all classes of the model, by class index.
        stage: the stage that the detections come from, such as `decoder.6`.
        trained_on: what the model was trained on, such as `synthetic drawn shapes: 5 classes`.
    """

    image: UInt8[Tensor, "3 h w"]
    instances: Instances
    classes: tuple[str, ...]
    stage: str
    trained_on: str = ""

    @property
    def boxes(self) -> Float[Tensor, "n 4"]:
        """Boxes as xyxy in pixels of the image."""
        return self.instances.boxes

    @property
    def masks(self) -> Bool[Tensor, "n h w"]:
        """Masks at the size of the image, made when they are asked for; `to_coco` and `save` do not need them all.

        Raises:
            ValueError: the stage predicts no masks.
        """
        return self.instances.masks

    @property
    def scores(self) -> Float[Tensor, " n"]:
        """Scores in [0, 1]."""
        return self.instances.scores

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """Class indices."""
        return self.instances.labels

    @property
    def class_names(self) -> list[str]:
        """Class name of each detection."""
        return [self.classes[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.image.shape[-2:]
        best = zip(self.class_names[:8], self.scores.tolist()[:8], strict=True)
        listed = ", ".join(f"{name} {score:.2f}" for name, score in best)
        more = f", and {len(self) - 8} more" if len(self) > 8 else ""
        origin = f"; trained on {self.trained_on}" if self.trained_on else ""
        return f"<Result: {len(self)} detections at {self.stage} in {width}x{height}: {listed}{more}{origin}>"

    def plot(self) -> "Figure":
        """Draw masks, boxes, class names and scores over the image."""
        from dimaskdino.viz import draw_instances

        return draw_instances(self.image, self.instances, self.classes, threshold=0)

    def _repr_png_(self) -> Any:
        return self.plot()._repr_png_()  # type: ignore[attr-defined]

    def save(self, path: str | Path) -> None:
        """Save the image with the detections drawn in the colours of their classes.

        Args:
            path: the file, which is replaced if it exists. Its suffix names the format: images (`.png`, `.jpg`, …) have
                the size of the photograph; vector graphics (`.pdf`, `.svg`) hold the figure of `plot`.

        Raises:
            UserError: the format is unknown or the file cannot be written.
        """
        path = Path(path)
        try:
            if path.suffix.lower() in SUFFIXES:
                painted = Image.fromarray(paint_instances(self.image, self.instances, self.classes))
                # compress_level of PNG files: faster, slightly larger
                write_atomically(path, lambda partial: painted.save(partial, compress_level=1))
            else:
                write_atomically(path, self.plot().savefig)
        except ValueError as error:  # an unknown format
            raise UserError(f"cannot write {path}: {error}") from None

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Convert to COCO's result format: boxes as xywh in pixels, masks as compressed run lengths (RLE).

        Args:
            image_id: id of the image.
            category_ids: the dataset's category id of each class; 1, 2, … by default.
        """
        ids = range(1, len(self.classes) + 1) if category_ids is None else category_ids
        masks = None if self.instances.query_masks is None else encode_masks(self.instances.query_masks)
        annotations: list[dict[str, Any]] = []
        for i, (x0, y0, x1, y1) in enumerate(self.boxes.tolist()):
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": ids[int(self.labels[i])],
                    "score": float(self.scores[i]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                }
            )
            if masks is not None:
                annotations[i]["segmentation"] = masks[int(self.instances.mask_index[i])]
        return annotations

    def to_supervision(self) -> Any:
        """Convert to `supervision.Detections`, with `data["class_name"]`.

        Raises:
            UserError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision needs supervision: pip install 'dimaskdino[supervision]'") from None
        return supervision.Detections(
            xyxy=self.boxes.float().cpu().numpy(),
            mask=None if self.instances.query_masks is None else self.masks.cpu().numpy(),
            confidence=self.scores.float().cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )


class Model(TrainedModel):
    """A trained model, ready to predict. `load` makes one.

    Attributes:
        detector: the network, a `torch.nn.Module`.
        config: the settings that it was trained with.
        classes: class names, in the order of the class indices.
        step: number of optimizer steps that it was trained for.
        precision: precision of the forward pass.
    """

    def __repr__(self) -> str:
        shown = ", ".join(self.classes[:8]) + (f" and {len(self.classes) - 8} more" if len(self.classes) > 8 else "")
        return f"<Model: {_architecture(self)}, trained on {self.trained_on} ({shown}), step {self.step:,}>"

    @property
    def trained_on(self) -> str:
        """What it was trained on, such as `synthetic drawn shapes: 5 classes`."""
        return training_data(self.config)

    @property
    def stages(self) -> list[str]:
        """Names of the stages that `predict` accepts, in the order of the model; the last is the default."""
        return stage_names(self.config.model)

    @overload
    def predict(  # type: ignore[overload-overlap]  # a path is a sequence of strings, too
        self, images: ImageInput, *, stage: str | None = ..., threshold: float = ...
    ) -> Result: ...
    @overload
    def predict(
        self, images: Sequence[ImageInput], *, stage: str | None = ..., threshold: float = ..., batch_size: int = ...
    ) -> list[Result]: ...
    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        stage: str | None = None,
        threshold: float = 0.3,
        batch_size: int = 8,
    ) -> Result | list[Result]:
        """Detect objects in an image, or in each image of a list.

        Images are resized as in testing; results are at the size of the image.

        Args:
            images: a path, a Pillow image, an array (h, w, 3), a tensor (3, h, w), or a list of these. Arrays and
                tensors are RGB; integers are 0 to 255, floating-point values 0 to 1.
            stage: the stage to take the detections from, such as `decoder.1`; the last decoder layer by default.
            threshold: detections with a lower score are left out.
            batch_size: number of images per forward pass, at most. Images of different sizes never share one, so
                that results do not depend on the other images.

        Returns:
            A result, or one per image of the list, in its order.

        Raises:
            UserError: an image cannot be read, the model has no such stage, or an argument is out of range.

        Example:
            >>> result = dimaskdino.load("dimaskdino-shapes").predict("photo.jpg", threshold=0.5)
            >>> result.boxes.shape
            torch.Size([3, 4])
        """
        if not 0 <= threshold <= 1:
            raise UserError(f"the threshold is a score from 0 to 1, got {threshold:g}")
        inputs: Any = images if isinstance(images, list | tuple) else [images]
        tensors = [to_image_tensor(image) for image in inputs]
        shapes = self.config.data.shapes
        if shapes and any(image.shape[-2:] != (shapes.size, shapes.size) for image in tensors):
            _note(
                f"this model was trained on {self.trained_on} ({', '.join(self.classes)}) and knows nothing else. For "
                'photographs: dimaskdino.load("dimaskdino-r50-coco-12ep"), or train on your own (docs/usage.md)'
            )
        name = self.stages[-1] if stage is None else stage
        detected = predict_images(self, tensors, [name], batch_size, float(threshold)) if tensors else []
        results = []
        for image, by_stage in zip(tensors, detected, strict=True):
            boxes = clip_boxes_to_image(by_stage[name].boxes, (image.shape[-2], image.shape[-1]))
            instances = replace(by_stage[name], boxes=boxes)
            results.append(Result(image, instances, tuple(self.classes), name, self.trained_on))
        return results if isinstance(images, list | tuple) else results[0]

    def inspect(self, image: ImageInput | Sample) -> Look:
        """Run the model on one image and keep every stage and the paper's intermediates by name.

        Args:
            image: as for `predict`, or a dataset's sample with its objects.

        Returns:
            A `Look`, with `predictions.stages["decoder.1"]`, `instances("decoder.1")`, `trace.T_s2`,
            `trace.guidance_attention` and so on.

        Raises:
            UserError: the image cannot be read.
        """
        sample = image if isinstance(image, Sample) else Sample.of_image(to_image_tensor(image))
        return look_at(self, sample)

    def save(self, folder: str | Path, layerwise_ap: LayerwiseAP | None = None, overwrite: bool = False) -> None:
        """Write the model to a folder that `load` reads and that the Hugging Face Hub accepts.

        The folder receives `model.safetensors`, `config.json`, a model card `README.md` and, with `layerwise_ap`,
        `layers.json`.

        Args:
            folder: the folder; created if it does not exist.
            layerwise_ap: AP of every stage, for the model card.
            overwrite: replace files of these names.

        Raises:
            UserError: one of the files exists, or the folder cannot be written.
        """
        folder = Path(folder)
        refuse_existing([folder / name for name in hub.FILES], overwrite, "overwrite=True")
        save_model(folder / MODEL, self.detector, self.config, self.classes, self.step)
        settings = {"classes": self.classes, "step": self.step, **self.config.model_dump(mode="json")}
        write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")
        if layerwise_ap is not None:
            layerwise_ap.save(folder / "layers.json")
        write_text(folder / "README.md", _model_card(self, layerwise_ap))

    def push_to_hub(self, hub_id: str, layerwise_ap: LayerwiseAP | None = None, private: bool = False) -> str:
        """Upload the files that `save` writes to the Hugging Face Hub, with paths shortened as by `dimaskdino share`.

        Args:
            hub_id: `owner/name`; created if it does not exist.
            layerwise_ap: AP of every stage, for the model card.
            private: whether a new repository is private.

        Returns:
            The address of the upload.

        Raises:
            UserError: `huggingface_hub` is missing, nobody is logged in, or the upload failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            replace(self, config=shared_config(self.config)).save(folder, layerwise_ap)
            return hub.upload(Path(folder), hub_id, private)


def load(
    source: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: Precision | Literal["auto"] = "fp32",
    overrides: Iterable[str] = (),
    config: Config | None = None,
    plugins: Iterable[str] = (),
) -> Model:
    """Load a trained model.

    Args:
        source: one of

            * a run folder, such as `runs/mine`, or a folder that `Model.save` wrote,
            * a file: `model.safetensors`, a resume point `.pt`, a published checkpoint `.pth` or `.pkl`,
            * a name that `dimaskdino models` lists, such as `dimaskdino-r50-coco-12ep`, which is downloaded once, or
              `dimaskdino-shapes`, which ships with the kit,
            * a model on the Hugging Face Hub: `owner/name` or `owner/name@revision`.
        device: any device of torch; `auto` is a GPU if there is one, else the CPU.
        precision: precision of the forward pass: `fp32`, `tf32`, `bf16` or `fp16`; or `auto`: `bf16` where the device
            is faster with it, else `fp32`.
        overrides: `key=value` settings that differ from those stored with the model, such as
            `data.resize.shortest=640`.
        config: the configuration that a published checkpoint was trained with; by default inferred from the weights.
        plugins: Python modules of your own that the model's configuration names and that may run (docs/extend.md).

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: there is no such model, it is truncated, does not fit its configuration, or needs a module that
            `plugins` does not name.
    """
    allow(plugins)
    known = ("auto", *get_args(Precision))
    if precision not in known:
        raise UserError(f"the precision is one of {', '.join(known)}, got '{precision}'")
    path = Path(source)
    on_hub = isinstance(source, str) and hub.is_hub_id(source) and not path.suffix and not path.parent.exists()
    found = find_device(device)
    trained = load_checkpoint(hub.download(str(source)) if on_hub else source, found, overrides, config)
    chosen = fast_precision(found) if precision == "auto" else precision
    return Model(trained.detector, trained.config, trained.classes, trained.step, chosen)


def find_device(device: str | torch.device = "auto") -> torch.device:
    """Find a device by its name; `auto` is a GPU if there is one (under torchrun this process's), else the CPU.

    Raises:
        UserError: torch does not have this device here.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if str(device).startswith("mps") and not torch.backends.mps.is_available():
        raise UserError(f"the device '{device}' cannot be used here: PyTorch finds no Apple GPU")
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).split(". ")[0]
        raise UserError(f"the device '{device}' cannot be used here: {reason}") from None


@functools.cache
def _note(text: str) -> None:
    """Print a note, once per process."""
    print(f"note: {text}", file=sys.stderr)


def _architecture(model: Model) -> str:
    settings = model.config.model
    name = "DI-MaskDINO" if settings.bato.enabled or len(settings.selection.k) > 1 else "MaskDINO"
    return f"{name}, {settings.backbone.type or settings.backbone.name}"


def _model_card(model: Model, layerwise_ap: LayerwiseAP | None) -> str:
    architecture = _architecture(model)
    classes = ", ".join(map(escape, model.classes[:20])) + (", …" if len(model.classes) > 20 else "")
    text = f"""---
library_name: dimaskdino
pipeline_tag: image-segmentation
tags: [object-detection, instance-segmentation, di-maskdino]
---

# {architecture}

Trained on {escape(model.trained_on)}, for {model.step:,} steps. Classes: {classes}.

```python
import dimaskdino

result = dimaskdino.load("OWNER/NAME").predict("photo.jpg")
```
"""
    if layerwise_ap is not None:
        text += f"\nAP on {layerwise_ap.images} images, by stage:\n\n{layerwise_ap.markdown()}\n"
    return text
