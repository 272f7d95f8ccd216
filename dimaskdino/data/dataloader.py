"""Batches: collation, and a training order that depends on the seed and the position alone."""

import contextlib
import shutil
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert

from dimaskdino import config
from dimaskdino.data.coco import CocoDataset, Sample
from dimaskdino.data.transforms import copy_paste, evaluation_resize, resized_size, training_transform
from dimaskdino.modeling.structures import Targets, padded_size
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.signals import HelperSignals
from dimaskdino.utils.threads import available_cores

SHARED, LEAST_SHARED = Path("/dev/shm"), 2**28  # bytes, for the batches of loader processes
BAD_IMAGES_IN_A_ROW = 20  # more than that means a wrong folder


@dataclass(frozen=True)
class Batch:
    """Images of any sizes, their objects padded to one size, and their origin."""

    images: list[Tensor]
    targets: Targets
    image_ids: list[int]
    files: list[str]
    original_sizes: list[tuple[int, int]]
    skipped: list[str]

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory; called by the loader."""
        return replace(self, images=[image.pin_memory() for image in self.images], targets=self.targets.pin_memory())


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate samples. Boxes are tight boxes of the masks, cxcywh relative to the padded size."""
    H, W = padded_size([(s.image.shape[-2], s.image.shape[-1]) for s in samples])
    M = max(len(s.labels) for s in samples)
    labels = torch.zeros(len(samples), M, dtype=torch.int64)
    boxes = torch.zeros(len(samples), M, 4)
    masks = torch.zeros(len(samples), M, H, W, dtype=torch.uint8)
    for b, sample in enumerate(samples):
        m, h, w = sample.masks.shape
        labels[b, :m] = sample.labels
        masks[b, :m, :h, :w] = sample.masks
        if m:
            boxes[b, :m] = box_convert(sample.boxes.float(), "xyxy", "cxcywh") / torch.tensor([W, H, W, H])
    return Batch(
        [s.image for s in samples],
        Targets(labels, boxes, masks, tuple(len(s.labels) for s in samples)),
        [s.image_id for s in samples],
        [s.file for s in samples],
        [s.original_size for s in samples],
        [reason for s in samples for reason in s.skipped],
    )


class _ByPosition(Dataset[Sample]):
    """The endless training sequence: item p is a function of the seed and p alone."""

    def __init__(self, data: CocoDataset, seed: int, settings: config.Data) -> None:
        self.data, self.seed, self.settings = data, seed, settings
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.data))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        return int(self._order[place])

    def __getitem__(self, position: int) -> Sample:
        index, skipped = self._index(position), []
        for attempt in range(BAD_IMAGES_IN_A_ROW):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence([self.seed, 1, position]).generate_state(1)[0]))
                try:
                    sample = self._augmented((index + attempt) % len(self.data))
                except UserError as error:
                    if not self.settings.skip_bad_images:
                        raise UserError(f"{error} (data.skip_bad_images=true replaces such images)") from None
                    skipped.append(str(error))
                    continue
            return replace(sample, skipped=tuple(skipped))
        raise UserError(f"{BAD_IMAGES_IN_A_ROW} bad images in a row, the last: {skipped[-1]}")

    def _augmented(self, index: int) -> Sample:
        sample = self.data[index]
        if not self.settings.copy_paste or torch.rand(()) >= self.settings.copy_paste:
            return sample
        return copy_paste(sample, self.data[int(torch.randint(len(self.data), ()))])


class _Positions:
    """Sampler of the positions of one process's parts of each step.

    The batch of a step is split into world × parts pieces of about equal size; piece i of process r is number
    r·parts + i. So eight processes with one part, four with two and one with eight work on the same pieces.
    """

    def __init__(self, first: int, steps: int, batch: int, rank: int, world: int, parts: int) -> None:
        self.first, self.steps, self.batch = first, steps, batch
        pieces = world * parts
        cuts = [batch * piece // pieces for piece in range(pieces + 1)]
        self.parts = [range(cuts[p], cuts[p + 1]) for p in range(rank * parts, (rank + 1) * parts)]

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            for part in self.parts:
                yield [step * self.batch + position for position in part]

    def __len__(self) -> int:
        return (self.steps - self.first) * len(self.parts)


def training_dataset(settings: config.Config) -> CocoDataset:
    """The training split with its augmentation."""
    data = settings.data
    return CocoDataset(data.root, data.train, training_transform(data), only_with_objects=True)


def training_loader(data: CocoDataset, settings: config.Config, first_step: int, rank: int, world: int) -> DataLoader:
    """Batches from `first_step` on, `train.accumulate` of them per step.

    Raises:
        UserError: the batch has fewer images than parts.
    """
    train = settings.train
    if train.batch_size < world * train.accumulate:
        raise UserError(
            f"train.batch_size = {train.batch_size} is less than one image per part: {world} processes x "
            f"{train.accumulate} parts"
        )
    positions = _Positions(first_step, settings.schedule.steps, train.batch_size, rank, world, train.accumulate)
    return _loader(_ByPosition(data, train.seed, settings.data), positions, settings)


def evaluation_dataset(settings: config.Config, split: str | None = None) -> CocoDataset:
    """A split (`data.val` by default), resized for testing."""
    data = settings.data
    return CocoDataset(data.root, split or data.val, evaluation_resize(data.resize))


def evaluation_loader(data: CocoDataset, settings: config.Config, groups: Sequence[Sequence[int]]) -> DataLoader:
    """The images at these positions of a dataset, in order. No batch spans two groups."""
    size = settings.evaluation.batch_size
    positions = []
    for group in groups:
        positions += [list(group[i : i + size]) for i in range(0, len(group), size)]
    return _loader(data, positions, settings)


def equally_padded(data: CocoDataset, positions: Sequence[int], settings: config.Config) -> list[Sequence[int]]:
    """Group positions for `evaluation_loader`, since padding to a larger neighbour changes an image's detections."""
    if settings.evaluation.batch_size == 1:
        return [positions]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position in positions:
        image = data.images[position]
        size = resized_size((image["height"], image["width"]), settings.data.resize)
        groups[padded_size([size])].append(position)
    return list(groups.values())


def _loader(data: Dataset[Sample], positions: Sized, settings: config.Config) -> DataLoader:
    # more loader processes than cores slow each other down
    workers = min(settings.data.workers, available_cores()) if len(positions) else 0
    if workers and SHARED.exists() and shutil.disk_usage(SHARED).total < LEAST_SHARED:
        print(
            f"note: images are loaded without loader processes, which need more shared memory than {SHARED} has "
            f"({shutil.disk_usage(SHARED).total / 2**20:.0f} MiB); in Docker: --shm-size=2g",
            file=sys.stderr,
        )
        workers = 0
    return DataLoader(
        data,
        batch_sampler=positions,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=partial(_start_worker, HelperSignals()),
        pin_memory=torch.cuda.is_available(),
    )


def _start_worker(signals: HelperSignals, worker: int) -> None:
    """Prepare a loader process. A training that is asked to stop saves first, and then ends its loaders."""
    torch.set_num_threads(1)
    signals()


def batches(loader: DataLoader) -> Generator[Batch, None, None]:
    """Iterate over a loader; closing the iterator ends the loader's processes.

    Raises:
        UserError: an image or annotation cannot be used.
    """
    with without_worker_traceback():
        yield from loader


@contextlib.contextmanager
def without_worker_traceback() -> Iterator[None]:
    """Raise a `UserError` of a loader process as it was, without the traceback that PyTorch puts into its message."""
    try:
        yield
    except UserError as error:
        raise UserError(error.args[0].rpartition("UserError: ")[2].strip()) from None


@contextlib.contextmanager
def explaining_dead_workers() -> Iterator[None]:
    """Turn the death of a loader process into a `UserError`; PyTorch raises it from a signal handler, anywhere.

    Raises:
        UserError: a loader process died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a loader process died ({first_line(error)}), perhaps because memory or shared memory ran "
            "out; try a smaller data.workers"
        ) from error
