"""Models as files for other runtimes: ONNX (ONNX Runtime, OpenVINO, TensorRT) and torch.export (PyTorch alone)."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ms_deform_attn
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_convert

from dimaskdino.checkpoints import TrainedModel
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.stages import last_layer
from dimaskdino.modeling.structures import PIXEL_MEAN, PIXEL_STD, SIZE_DIVISOR
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import write_atomically

OUTPUTS = ("boxes", "scores", "labels", "masks")
OPSET = 20  # the first with bilinear grid sampling of any rank
SMALLEST, LARGEST, MOST_IMAGES = 64, 2048, 64  # what a file takes: sides in pixels, batch size
PT2_SMALLEST = 96  # of torch.export, whose sides are multiples of 32
# traced with the first, checked with both
_EXAMPLES = {".onnx": ((2, 120, 150), (3, 90, 215)), ".pt2": ((2, 128, 160), (3, 96, 224))}


class Exportable(nn.Module):
    """A detector from pixels to detections in one graph of plain operators.

    It pads the images to multiples of 32 itself; the detections are those of `postprocess` at the images' own size. It
    does not call `postprocess`, whose loops over images and masks depend on the values and cannot be traced. Nor could
    `postprocess` work like this, on whole masks of all detections: 100 of them at 800×1088 pixels take ten times as
    long on a CPU, 6.4 s instead of 0.6 s.

    Args:
        detector: the model.
        stage: the stage to take the detections from; it must have masks.
        detections: number of detections per image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector, stage: str, detections: int) -> None:
        super().__init__()
        self.detector, self.stage, self.detections = detector, stage, detections
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(3, 1, 1))

    def forward(
        self, images: Float[Tensor, "B 3 h w"]
    ) -> tuple[Float[Tensor, "B n 4"], Float[Tensor, "B n"], Int[Tensor, "B n"], Bool[Tensor, "B n h w"]]:
        """Detect objects.

        Args:
            images: RGB, 0 to 255, resized as in testing.

        Returns:
            Boxes (xyxy in pixels), scores in [0, 1], class indices and masks of the detections, best first.
        """
        h, w = images.shape[-2:]
        pixels = functional.pad((images - self.mean) / self.std, (0, -w % SIZE_DIVISOR, 0, -h % SIZE_DIVISOR))
        height, width = pixels.shape[-2:]
        stage = self.detector(ImageBatch(pixels, ())).stages[self.stage]  # the detector needs no sizes
        classes = stage.class_logits.shape[-1]
        scores, pairs = stage.class_logits.sigmoid().flatten(1).topk(self.detections, dim=1)
        queries, labels = pairs // classes, pairs % classes
        x0, y0, x1, y1 = box_convert(_rows(stage.boxes, queries), "cxcywh", "xyxy").unbind(-1)
        # one product per coordinate: a tensor of the sides, which stay open, would hold constants
        boxes = torch.stack([x0 * width, y0 * height, x1 * width, y1 * height], -1)
        logits = torch.einsum("bqc,bchw->bqhw", _rows(stage.mask_embedding, queries), stage.mask_features)
        enlarged = functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        enlarged = enlarged[:, :, :h, :w]
        masks = enlarged > 0
        quality = (enlarged.sigmoid() * masks).sum((2, 3)) / (masks.sum((2, 3)) + 1e-6)
        scores, order = (scores * quality).topk(self.detections, dim=1)
        return _rows(boxes, order), scores, labels.gather(1, order), _rows(masks, order)


def _rows(values: Tensor, index: Int[Tensor, "B n"]) -> Tensor:
    """Rows of a tensor (B, q, …): (B, n, …)."""
    more = values.shape[2:]
    return values.gather(1, index.view(*index.shape, *(1 for _ in more)).expand(-1, -1, *more))


def export(
    model: TrainedModel, path: Path, stage: str | None = None, detections: int | None = None
) -> dict[str, float] | None:
    """Write a model to an ONNX file, or to a file of torch.export. Batch and image size stay open.

    Args:
        model: the model.
        path: the file: `.onnx`, or `.pt2` for torch.export, which takes sides that are multiples of 32.
        stage: the stage to take the detections from; the last decoder layer by default.
        detections: number of detections per image; `evaluation.detections` by default.

    Returns:
        By output, the largest difference between the file and PyTorch on random images of two sizes; of labels and
        masks the fraction that differs. Boxes, labels and masks are compared for the detections whose scores
        `well_separated` separates. None if ONNX Runtime is not installed.

    Raises:
        UserError: the file has another suffix, the stage has no masks, packages are missing, or PyTorch cannot export
            the model. No file is left then.
    """
    if path.suffix not in _EXAMPLES:
        raise UserError(f"{path}: the file must end in .onnx, or in .pt2 for torch.export")
    settings = model.config
    stage = stage or last_layer(settings.model)
    most = settings.model.selection.k[-1] * settings.model.classes
    count = min(detections or settings.evaluation.detections, most)
    module = Exportable(model.detector.cpu().eval(), stage, count)
    _check_stage(module)
    batch, height, width = _EXAMPLES[path.suffix][0]
    example = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    write = _write_onnx if path.suffix == ".onnx" else _write_pt2
    try:
        with torch.no_grad(), warnings.catch_warnings(), ms_deform_attn.backend("reference"):
            warnings.simplefilter("ignore")  # of the exporters about themselves
            write(module, example, path)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"ONNX files need more packages ({error.name}): pip install 'dimaskdino[onnx]'") from None
    except Exception as error:  # the exporters raise many kinds for what they do not support
        raise UserError(f"PyTorch cannot export this model: {first_line(error)}") from error
    return _compare(module, path)


def _check_stage(module: Exportable) -> None:
    with torch.inference_mode():
        stages = module.detector(ImageBatch(torch.zeros(1, 3, SMALLEST, SMALLEST), ())).stages
    with_masks = [name for name, stage in stages.items() if stage.mask_embedding is not None]
    if module.stage not in with_masks:
        raise UserError(f"no masks at the stage '{module.stage}'; those with masks are {', '.join(with_masks)}")


def _open_sizes(smallest: int, divisor: int) -> tuple[dict[int, Any]]:
    """Dimensions of the images that stay open: batch, and sides that are multiples of a divisor."""
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    height = torch.export.Dim("height", min=smallest // divisor, max=LARGEST // divisor)
    width = torch.export.Dim("width", min=smallest // divisor, max=LARGEST // divisor)
    return ({0: batch, 2: divisor * height, 3: divisor * width},)


def _write_onnx(module: Exportable, example: Tensor, path: Path) -> None:
    import onnxscript  # noqa: F401  the exporter needs it, and says so in many lines

    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=_open_sizes(SMALLEST, 1),
        opset_version=OPSET,
        verbose=False,
        input_names=["images"],
        output_names=list(OUTPUTS),
    )
    assert program is not None
    write_atomically(path, lambda partial: program.save(partial))


def _write_pt2(module: Exportable, example: Tensor, path: Path) -> None:
    program = torch.export.export(
        module,
        (example,),
        dynamic_shapes=_open_sizes(PT2_SMALLEST, SIZE_DIVISOR),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    write_atomically(path, lambda partial: torch.export.save(program, partial))


def _runner(path: Path) -> Callable[[Tensor], Sequence[Tensor]] | None:
    """A function that runs an exported file on images; None if ONNX Runtime is needed and not installed."""
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about shared weights
            return torch.export.load(path).module()
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def _compare(module: Exportable, path: Path) -> dict[str, float] | None:
    """Run the file and the model on the same images."""
    exported = _runner(path)
    if exported is None:
        return None
    differences = dict.fromkeys(OUTPUTS, 0.0)
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in _EXAMPLES[path.suffix]:
        images = torch.rand(batch, 3, height, width, generator=generator) * 255
        with torch.no_grad():
            found, wanted = exported(images), module(images)
        rows = torch.stack([well_separated(scores) for scores in wanted[1]])
        for name, ours, theirs in zip(OUTPUTS, found, wanted, strict=True):
            difference = (ours.float() - theirs.float()).abs()
            if name != "scores":
                difference = difference[rows]
            if difference.numel():
                worst = (difference > 0).float().mean() if name in ("labels", "masks") else difference.amax()
                differences[name] = max(differences[name], float(worst))
    return differences


def well_separated(scores: Float[Tensor, " n"], gap: float = 1e-5) -> Bool[Tensor, " n"]:
    """Which of these descending scores differ from their neighbours by more than rounding can exchange."""
    apart = scores[:-1] - scores[1:] > gap
    end = torch.ones(1, dtype=torch.bool)
    return torch.cat([end, apart]) & torch.cat([apart, ~end])  # the score after the last is not known
