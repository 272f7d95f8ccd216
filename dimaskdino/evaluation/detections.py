"""Detections of whole datasets: as arrays in memory, and on disk in parts that are written atomically."""

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dimaskdino import config
from dimaskdino.checkpoints.model_files import TrainedModel
from dimaskdino.data.annotations import without_collection
from dimaskdino.data.coco import encode_masks
from dimaskdino.evaluation.coco_ap import Kind, Results
from dimaskdino.modeling import Instances
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.files import refuse_existing, write_atomically, write_text

PART, LEAST_PARTS = 50, 20  # images of a part; parts of a dataset, where it has that many images
POLL_SECONDS = 0.5
START_SECONDS = 600  # the first process may have to read a large model


@dataclass(frozen=True)
class Detections:
    """The detections of one stage in some images, with run-length encoded masks.

    Attributes:
        image_ids: (n,) of the annotations.
        categories: (n,) category ids of the annotations.
        scores: (n,) in [0, 1].
        xyxy: (n, 4) in pixels of the original image.
        mask_index: (n,) row of each detection's mask among the u masks; empty for a stage without masks.
        mask_sizes: (u, 2) h, w.
        mask_lengths: (u,) number of bytes of each encoding.
        mask_codes: the encodings, concatenated.
    """

    image_ids: Int[np.ndarray, " n"]
    categories: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    xyxy: Float[np.ndarray, "n 4"]
    mask_index: Int[np.ndarray, " m"]
    mask_sizes: Int[np.ndarray, "u 2"]
    mask_lengths: Int[np.ndarray, " u"]
    mask_codes: UInt8[np.ndarray, " bytes"]

    @classmethod
    def of(cls, image_id: int, instances: Instances, category_ids: Sequence[int]) -> "Detections":
        """The detections in one image, at its original size.

        Args:
            image_id: of the annotations.
            instances: the detections.
            category_ids: the dataset's category id of each label.
        """
        n = len(instances.scores)
        index = np.zeros(0, np.int64)
        sizes, codes = [], []
        if instances.query_masks is not None and n:
            index = instances.mask_index.cpu().numpy().astype(np.int64)
            # one query can be detected as several classes: encode its mask once
            for encoded in encode_masks(instances.query_masks):
                sizes.append(encoded["size"])
                codes.append(encoded["counts"].encode())
        return cls(
            image_ids=np.full(n, image_id, np.int64),
            categories=np.asarray(category_ids, np.int64)[instances.labels.cpu().numpy()],
            scores=instances.scores.float().cpu().numpy(),
            xyxy=instances.boxes.float().cpu().numpy(),
            mask_index=index,
            mask_sizes=np.array(sizes, np.int64).reshape(-1, 2),
            mask_lengths=np.array([len(code) for code in codes], np.int64),
            mask_codes=np.frombuffer(b"".join(codes), np.uint8),
        )

    @classmethod
    def joined(cls, parts: Sequence["Detections"]) -> "Detections":
        """Concatenate the detections of several images."""
        columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(cls)}
        masks = 0
        for part in parts:
            for name, values in columns.items():
                values.append(getattr(part, name))
            columns["mask_index"][-1] = part.mask_index + masks
            masks += len(part.mask_lengths)
        return cls(**{name: np.concatenate(values) for name, values in columns.items()})

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> "Detections":
        """The detections with at least this score."""
        keep = self.scores >= threshold
        return replace(
            self,
            image_ids=self.image_ids[keep],
            categories=self.categories[keep],
            scores=self.scores[keep],
            xyxy=self.xyxy[keep],
            mask_index=self.mask_index[keep] if self.has_masks else self.mask_index,
        )

    @property
    def has_masks(self) -> bool:
        return len(self.mask_index) == len(self.scores) > 0

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("box", "mask") if self.has_masks else ("box",)

    def results(self, kind: Kind) -> Results:
        """The detections as COCO's evaluation takes them: boxes as a table, masks as dictionaries."""
        return self.box_table if kind == "box" else self.masks

    @property
    def box_table(self) -> Float[np.ndarray, "n 7"]:
        """Boxes as in COCO's result arrays: image id, x, y, width, height, score, category id."""
        xyxy = self.xyxy.astype(np.float64)
        columns = (self.image_ids[:, None], xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2])
        return np.concatenate([*columns, self.scores[:, None], self.categories[:, None]], axis=1, dtype=np.float64)

    @property
    @without_collection()
    def boxes(self) -> list[dict[str, Any]]:
        """Boxes in COCO's result format."""
        return self._rows("bbox", self.box_table[:, 1:5].tolist())

    @property
    @without_collection()
    def masks(self) -> list[dict[str, Any]]:
        """Masks in COCO's result format; none for a stage without masks."""
        if not self.has_masks:
            return []
        codes, encoded, start = self.mask_codes.tobytes(), [], 0
        for size, length in zip(self.mask_sizes.tolist(), self.mask_lengths.tolist(), strict=True):
            encoded.append({"size": size, "counts": codes[start : start + length]})
            start += length
        return self._rows("segmentation", [encoded[index] for index in self.mask_index.tolist()])

    def _rows(self, name: str, values: list[Any]) -> list[dict[str, Any]]:
        columns = zip(self.image_ids.tolist(), self.categories.tolist(), self.scores.tolist(), values, strict=True)
        return [
            {"image_id": image, "category_id": c, "score": score, name: value} for image, c, score, value in columns
        ]


_PART = "[0-9][0-9][0-9][0-9][0-9][0-9].safetensors"


class DetectionStore(Mapping[str, Detections]):
    """Detections of every stage on disk. `store["decoder.6"]` reads one stage, so memory holds one at a time.

    The dataset is split into parts of `PART` images, a small one into twenty parts. A part is one file, written
    atomically, so an interrupted evaluation resumes with the missing parts.

    Args:
        folder: folder of the files; None for a temporary folder that lives as long as this object.
        about: identifies model, data and settings; a folder with detections of something else is emptied.
        images: number of images in the dataset.
        first: whether this process prepares the folder; the others wait until it is ready.

    Raises:
        UserError: the first process did not prepare the folder.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], images: int, first: bool = True) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="dimaskdino-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.folder = folder
        self.images = images
        self._note = folder / "about.json"
        self._part = max(1, min(PART, images // LEAST_PARTS))
        about = about | {"images per part": self._part}
        deadline = time.monotonic() + START_SECONDS
        while not first and not self._is_about(about):
            if time.monotonic() > deadline:
                raise UserError(
                    f"no process prepared {self.folder}; do all machines see this folder, and images of the same times?"
                )
            time.sleep(POLL_SECONDS)
        if not self._is_about(about):
            if not self._note.exists():  # then other files of these names are not of this kit
                refuse_existing(self.folder.glob(_PART), overwrite=False, insist="another --output")
            self.remove()
            write_text(self._note, json.dumps(about, indent=1, sort_keys=True))

    def _is_about(self, about: dict[str, Any]) -> bool:
        """Whether the files were made as `about` says; settings that they lack count as default values."""
        try:
            stored = json.loads(self._note.read_text(encoding="utf-8"))
            if "model" in stored:
                stored["model"] = config.Model.model_validate(stored["model"]).model_dump(mode="json")
        except (OSError, ValueError, TypeError):
            return False
        return stored == about

    @property
    def parts(self) -> range:
        return range(-(-self.images // self._part))

    def images_of(self, part: int) -> range:
        """Positions in the dataset of the images of a part."""
        return range(part * self._part, min((part + 1) * self._part, self.images))

    def _file(self, part: int) -> Path:
        return self.folder / f"{part:06d}.safetensors"

    def missing(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Missing parts that process `shard[0]` of `shard[1]` has to write."""
        return [part for part in self.parts if part % shard[1] == shard[0] and not self._is_readable(part)]

    def _is_readable(self, part: int) -> bool:
        if not self._file(part).exists():
            return False
        try:
            with self._opened(part) as file:
                return "stages" in (file.metadata() or {})
        except UserError:
            return False

    def write(self, part: int, stages: Mapping[str, Sequence[Detections]]) -> None:
        """Write one part: the detections in its images at every stage.

        Raises:
            UserError: the disk is full.
        """
        arrays = {}
        for name, images in stages.items():
            for field, values in vars(Detections.joined(images)).items():
                arrays[f"{name}/{field}"] = values
        names = {"stages": json.dumps(list(stages))}
        write_atomically(self._file(part), lambda path: save_file(arrays, path, names))

    @contextlib.contextmanager
    def _opened(self, part: int) -> Iterator[Any]:
        try:
            with safe_open(self._file(part), framework="np") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file(part)} cannot be read ({error}); delete it and evaluate again") from None

    def _names(self) -> list[str]:
        with self._opened(0) as file:
            return json.loads(file.metadata()["stages"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __getitem__(self, stage: str) -> Detections:
        """Read the detections of one stage in all images.

        Raises:
            UserError: a part is missing or damaged.
            KeyError: there is no such stage.
        """
        if stage not in self._names():
            raise KeyError(stage)
        parts = []
        for part in self.parts:
            with self._opened(part) as file:
                parts.append(Detections(*(file.get_tensor(f"{stage}/{field.name}") for field in fields(Detections))))
        return Detections.joined(parts)

    def remove(self) -> None:
        """Delete the detections; other files in the folder stay."""
        parts = [*self.folder.glob(_PART), *self.folder.glob(f".{_PART.replace('.', '.*.partial.')}")]
        for file in (self._note, *parts):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def file_digest(path: Path) -> str:
    """A digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_digest(paths: Iterable[Path]) -> str:
    """A digest of the sizes and times of files, which change with their content."""
    digest = hashlib.sha256()
    for path in paths:
        with contextlib.suppress(OSError):  # a missing file is an error when it is read
            found = path.stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns},".encode())
    return digest.hexdigest()


def fingerprint(model: TrainedModel) -> str:
    """A digest of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.detector.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
