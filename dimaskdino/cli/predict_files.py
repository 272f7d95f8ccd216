"""Predict on files: folders of photographs and videos, to pictures and one COCO json."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from dimaskdino.data.images import SUFFIXES, find_files, to_image_tensor
from dimaskdino.data.painting import paint_instances
from dimaskdino.model import Model, Result
from dimaskdino.utils.errors import UserError, writing
from dimaskdino.utils.files import write_text
from dimaskdino.utils.progress import progress_bar

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


@dataclass
class FilesReport:
    """What `predict_files` did.

    Attributes:
        pictures: the drawn images and videos.
        json: the file with all detections, in COCO's format.
        detections: number of detections.
        skipped: what was wrong with the files that could not be read.
    """

    pictures: list[Path]
    json: Path
    detections: int = 0
    skipped: list[str] = field(default_factory=list)


def predict_files(
    model: Model,
    paths: Sequence[Path],
    output: Path,
    stage: str | None = None,
    threshold: float = 0.3,
    batch_size: int = 8,
) -> FilesReport:
    """Draw the detections in images and videos, and write them to `predictions.json`.

    The output mirrors the folders of the input. `predictions.json` has COCO's format, with a `score` per annotation,
    boxes as xywh in pixels and masks as compressed run lengths; each frame of a video is an image.

    Args:
        model: a model from `dimaskdino.load`.
        paths: image files, videos (where PyAV is installed), or folders of them.
        output: folder for the results.
        stage: the stage to take the detections from; the last decoder layer by default.
        threshold: detections with a lower score are left out.
        batch_size: number of images per forward pass, at most.

    Raises:
        UserError: a path does not exist, an argument is out of range, an output would overwrite an input, or the output
            cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    files = find_files(paths, (*SUFFIXES, *VIDEO_SUFFIXES))
    targets = _targets(files, output)
    result = FilesReport([], output / "predictions.json")
    coco = _CocoWriter(model)
    progress = progress_bar(total=len(files), description="predicting", unit="file")
    try:
        for start in range(0, len(files), batch_size):
            chunk = list(zip(files[start : start + batch_size], targets[start : start + batch_size], strict=True))
            pictures = [(file, target) for (file, _), target in chunk if file.suffix.lower() not in VIDEO_SUFFIXES]
            for file, target, prediction in _predict_pictures(model, pictures, stage, threshold, batch_size, result):
                coco.add(prediction, str(file))
                prediction.save(target)
                result.pictures.append(target)
            for (file, _), target in chunk:
                if file.suffix.lower() in VIDEO_SUFFIXES:
                    with writing(target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        _predict_video(model, file, target, stage, threshold, coco)
                    result.pictures.append(target)
            progress.update(len(chunk))
        write_text(result.json, json.dumps(coco.content))
    finally:
        progress.close()
    result.detections = len(coco.content["annotations"])
    return result


def _predict_pictures(
    model: Model,
    files: Sequence[tuple[Path, Path]],
    stage: str | None,
    threshold: float,
    batch_size: int,
    report: FilesReport,
) -> Iterator[tuple[Path, Path, Result]]:
    """Results of the files that can be read; the others are noted in the report."""
    readable, images = [], []
    for file, target in files:
        try:
            images.append(to_image_tensor(file))
            readable.append((file, target))
        except UserError as error:
            report.skipped.append(str(error))
            print(f"skipped: {error}")
    results = model.predict(images, stage=stage, threshold=threshold, batch_size=batch_size)
    for (file, target), prediction in zip(readable, results, strict=True):
        yield file, target, prediction


def _targets(files: Sequence[tuple[Path, Path]], output: Path) -> list[Path]:
    """Where the picture of each file goes: its relative path with `.png` (`.mp4` for videos), unique.

    Raises:
        UserError: a target is one of the inputs, or two inputs have the same relative path.
    """

    def target(name: Path) -> Path:
        return name.with_suffix(".mp4" if name.suffix.lower() in VIDEO_SUFFIXES else ".png")

    names = [name for _, name in files]
    short = [target(name) for name in names]
    # x.jpg and x.png in one folder: keep the whole name of both
    unique = [
        s if short.count(s) == 1 else n.with_name(f"{n.name}{s.suffix}") for s, n in zip(short, names, strict=True)
    ]
    inputs = {file.resolve() for file, _ in files}
    for number, name in enumerate(unique):
        if unique.index(name) != number:
            raise UserError(
                f"{files[unique.index(name)][0]} and {files[number][0]} would both be written to {output / name}; "
                "predict on them in two commands with different output folders"
            )
        if (output / name).resolve() in inputs:
            raise UserError(f"{output / name} is an input and would be overwritten; choose another output folder")
    return [output / name for name in unique]


class _CocoWriter:
    """Collects detections of many images in COCO's format."""

    def __init__(self, model: Model) -> None:
        categories = [{"id": i, "name": name} for i, name in enumerate(model.classes, start=1)]
        self.content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}

    def add(self, result: Result, file_name: str) -> None:
        """Add the detections of one image."""
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = result.image.shape[-2:]
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for record in result.to_coco(image_id):
            mask = record.get("segmentation")
            area = int(coco_mask.area(mask)) if mask else record["bbox"][2] * record["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **record, "area": area, "iscrowd": 0})


def _av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install 'dimaskdino[video]'") from None
    return av


def _predict_video(
    model: Model, file: Path, target: Path, stage: str | None, threshold: float, coco: _CocoWriter
) -> None:
    """Write the video with the detections of every frame drawn."""
    av = _av()
    try:
        source = av.open(str(file))
    except (OSError, ValueError) as error:  # av's errors are both
        raise UserError(f"the video {file} cannot be read: {error}") from None
    with source, av.open(str(target), "w") as written:
        stream = source.streams.video[0]
        drawn: Any = None
        rate = stream.average_rate or Fraction(25)
        frames = progress_bar(source.decode(stream), file.name, stream.frames or None, unit="frame")
        for number, frame in enumerate(frames):
            result = model.predict(frame.to_ndarray(format="rgb24"), stage=stage, threshold=threshold)
            coco.add(result, f"{file}#{number}")
            picture = _rgb(result)
            if drawn is None:
                drawn = written.add_stream("h264", rate=rate)
                drawn.height, drawn.width, drawn.pix_fmt = *picture.shape[:2], "yuv420p"
            written.mux(drawn.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if drawn is not None:
            written.mux(drawn.encode())


def _rgb(result: Result) -> np.ndarray:
    """The picture of a result at its image's own size, (h, w, 3) uint8; odd sizes lose a row or column."""
    canvas = paint_instances(result.image, result.instances, result.classes)
    height, width = canvas.shape[:2]
    return np.ascontiguousarray(canvas[: height // 2 * 2, : width // 2 * 2])
