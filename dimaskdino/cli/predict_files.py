"""Predicting on folders of photographs and videos; the results are pictures and one file in COCO's format."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from dimaskdino.data.images import SUFFIXES, find_files, to_image_tensor
from dimaskdino.data.painting import paint_instances
from dimaskdino.model import Model, Result
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import read_json_object, refuse_existing, write_atomically, write_text
from dimaskdino.utils.progress import progress_bar

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


@dataclass
class FilesReport:
    """The files that `predict_files` wrote and skipped.

    Attributes:
        pictures: the drawn images and videos.
        json: the file with all detections, in COCO's format.
        detections: number of detections.
        skipped: error messages of the files that could not be read.
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
    overwrite: bool = False,
) -> FilesReport:
    """Draw the detections in images and videos, and write them to `predictions.json`.

    The output mirrors the folders of the input. `predictions.json` has COCO's format, with a `score` per annotation,
    boxes as xywh in pixels and masks as compressed run lengths; each frame of a video is an image.

    Args:
        model: a model from `dimaskdino.load`.
        paths: image files, videos (where PyAV is installed), or folders of them.
        output: folder for the results.
        stage: the stage to take the detections from; the last decoder layer by default.
        threshold: lowest score of a detection, 0 to 1.
        batch_size: number of images per forward pass, at most.
        overwrite: replace files that exist. What the predictions.json in the output lists is always replaced.

    Raises:
        UserError: a path does not exist, an argument is out of range, an output would overwrite an input or a file of
            the user, or the output cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    files = find_files(paths, (*SUFFIXES, *VIDEO_SUFFIXES))
    targets = list(zip([file for file, _ in files], _targets(files, output), strict=True))
    pictures = [(file, target) for file, target in targets if not _is_video(file)]
    report = FilesReport([], output / "predictions.json")
    earlier, written = _written_before(report.json), {target.relative_to(output).as_posix() for _, target in targets}
    mine = {report.json.name, *earlier} if earlier else set()
    refuse_existing([output / name for name in sorted({report.json.name, *written} - mine)], overwrite)
    coco = _CocoFile(model, sorted(written | earlier))
    write_text(report.json, json.dumps(coco.content))  # lists the pictures before they are drawn
    with progress_bar(total=len(files), description="predicting", unit="file") as progress:
        for start in range(0, len(pictures), batch_size):
            batch = pictures[start : start + batch_size]
            readable, images = [], []
            for file, target in batch:
                try:
                    images.append(to_image_tensor(file))
                    readable.append((file, target))
                except UserError as error:
                    report.skipped.append(str(error))
                    print(f"skipped: {error}")
            results = model.predict(images, stage=stage, threshold=threshold, batch_size=batch_size)
            for (file, target), result in zip(readable, results, strict=True):
                coco.add(result, str(file))
                result.save(target)
                report.pictures.append(target)
            progress.update(len(batch))
        for file, target in targets:
            if _is_video(file):
                _predict_video(model, file, target, stage, threshold, coco)
                report.pictures.append(target)
                progress.update()
    write_text(report.json, json.dumps(coco.content))
    report.detections = len(coco.content["annotations"])
    return report


def _written_before(manifest: Path) -> set[str]:
    """Names of the pictures that earlier predictions into the folder wrote."""
    info = read_json_object(manifest).get("info")
    listed = info.get("written") if isinstance(info, dict) else None
    return {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def _targets(files: Sequence[tuple[Path, Path]], output: Path) -> list[Path]:
    """Return the picture of each file: its relative path with the suffix `.png`, `.mp4` for videos.

    Where x.jpg and x.png are in one folder, both keep their whole names before the new suffix.

    Raises:
        UserError: a picture would overwrite an input, or two inputs have the same relative path.
    """
    short = [name.with_suffix(".mp4" if _is_video(name) else ".png") for _, name in files]
    count, inputs = Counter(short), {_location(file) for file, _ in files}
    targets: dict[Path, Path] = {}  # the input of each picture
    for (file, name), picture in zip(files, short, strict=True):
        target = output / (picture if count[picture] == 1 else name.with_name(name.name + picture.suffix))
        if target in targets:
            raise UserError(
                f"{targets[target]} and {file} would both be written to {target}; predict on them in two commands with "
                "different output folders"
            )
        if _location(target) in inputs:
            raise UserError(f"{target} is an input and would be overwritten; choose another output folder")
        targets[target] = file
    return list(targets)


def _location(path: Path) -> Path:
    """Where a file lies. A link is a file of its own, since writing replaces it."""
    return path.parent.resolve() / path.name


class _CocoFile:
    """Collects the detections of many images in COCO's format; its `info` lists the drawn files."""

    def __init__(self, model: Model, written: Sequence[str]) -> None:
        categories = [{"id": i, "name": name} for i, name in enumerate(model.classes, start=1)]
        self.content: dict[str, Any] = {"info": {"written": list(written)}}
        self.content |= {"images": [], "annotations": [], "categories": categories}

    def add(self, result: Result, file_name: str) -> None:
        """Add the detections of one image."""
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = result.image.shape[-2:]
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for annotation in result.to_coco(image_id):
            mask = annotation.get("segmentation")
            area = int(coco_mask.area(mask)) if mask else annotation["bbox"][2] * annotation["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **annotation, "area": area, "iscrowd": 0})


def _predict_video(
    model: Model, file: Path, target: Path, stage: str | None, threshold: float, coco: _CocoFile
) -> None:
    """Write the video with the detections of every frame drawn.

    Raises:
        UserError: PyAV is missing, the video cannot be read or the target cannot be written.
    """
    try:
        import av
    except ImportError:
        raise UserError("videos need PyAV: pip install 'dimaskdino[video]'") from None
    try:
        source = av.open(str(file))
    except (OSError, ValueError) as error:  # PyAV's exceptions are both
        raise UserError(f"the video {file} cannot be read: {error}") from None
    with source:
        write_atomically(target, lambda partial: _draw_frames(source, partial, model, file, stage, threshold, coco))


def _draw_frames(
    source: Any, target: Path, model: Model, file: Path, stage: str | None, threshold: float, coco: _CocoFile
) -> None:
    import av

    with av.open(str(target), "w") as written:
        stream = source.streams.video[0]
        drawn: Any = None
        rate = stream.average_rate or Fraction(25)
        frames = progress_bar(source.decode(stream), file.name, stream.frames or None, unit="frame")
        for number, frame in enumerate(frames):
            result = model.predict(frame.to_ndarray(format="rgb24"), stage=stage, threshold=threshold)
            coco.add(result, f"{file}#{number}")
            picture = paint_instances(result.image, result.instances, result.classes)
            height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2  # H.264 needs even sides
            if drawn is None:
                drawn = written.add_stream("h264", rate=rate)
                drawn.height, drawn.width, drawn.pix_fmt = height, width, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            written.mux(drawn.encode(frame))
        if drawn is not None:
            written.mux(drawn.encode())
