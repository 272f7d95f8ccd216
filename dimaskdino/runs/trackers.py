"""The records of a training: its metrics file, and trackers (TensorBoard, Weights & Biases).

To add a tracker, write a class with the methods of `Tracker` and give it a name in `TRACKERS`. It is called with the
run folder, all settings as plain values, and the step that the training starts or resumes from.
"""

import contextlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dimaskdino.config import Config
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import read_json_object, write_atomically, write_text


class Tracker(Protocol):
    """Receives the records of a training, in the process that writes its folder."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers of a step."""

    def picture(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Record a picture of a step."""

    def close(self) -> None:
        """Finish, since the training has ended or was stopped."""


class Metrics:
    """Writes records to the metrics file, one JSON object per line, and pictures to a folder; trackers get both.

    Args:
        stream: the metrics file; None for a process that records nothing.
        trackers: open trackers by name.
        samples: folder of the pictures.
    """

    def __init__(self, stream: TextIO | None, trackers: Mapping[str, Tracker], samples: Path) -> None:
        self.stream, self.trackers, self.samples = stream, dict(trackers), samples

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which must have a `step`."""
        if self.stream is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.stream.write(json.dumps(record | {"time": now}) + "\n")
        self.stream.flush()
        values = record | record.get("losses", {}) | _flat(record.get("validation", {}), "validation/")
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        if numbers:
            self._send(lambda tracker: tracker.numbers(numbers, record["step"]))

    def picture(self, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Write a picture of a step to the folder of samples."""
        if self.stream is None:
            return
        write_atomically(self.samples / f"step_{step:06d}.png", lambda path: Image.fromarray(pixels).save(path, "PNG"))
        self._send(lambda tracker: tracker.picture("samples", pixels, step))

    def close(self) -> None:
        """Close the trackers."""
        self._send(lambda tracker: tracker.close())

    def _send(self, action: Callable[[Tracker], None]) -> None:
        """Call all trackers. One that fails is reported once and then left out; the training goes on."""
        for name, tracker in list(self.trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # each package has its own exceptions
                if isinstance(tracker, TensorBoard):  # it writes to the run folder, whose errors end the run
                    raise
                del self.trackers[name]
                print(f"note: {name} fails ({first_line(error)}); the training goes on without it", file=sys.stderr)


@contextlib.contextmanager
def hide_disk_errors_of_threads() -> Iterator[None]:
    """Hide the traceback of TensorBoard's thread on a full disk; the main thread reports it in one line."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


class TensorBoard:
    """Event files in the run folder; records of lost work after the first step are hidden."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only trainings need it

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the run folder. Its environment variables apply."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("train.trackers: wandb is not installed: pip install wandb") from None
        self._wandb = wandb
        file = folder / "trackers.json"  # so that a resumed training continues its record
        run = read_json_object(file).get("wandb") or uuid.uuid4().hex[:8]
        write_text(file, json.dumps({"wandb": run}) + "\n")
        self._run = self._wandb.init(
            project=self._wandb.Settings().project or "dimaskdino",
            name=folder.name,
            id=run,
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def open_trackers(config: Config, folder: Path, step: int) -> dict[str, Tracker]:
    """Open the trackers of a training, or continue their records.

    Args:
        config: all settings; `train.trackers` has keys of `TRACKERS`.
        folder: the run folder.
        step: the step that the training starts or resumes from.

    Raises:
        UserError: there is no such tracker, its package is not installed, or it cannot record.
    """
    trackers = {}
    for name in config.train.trackers:
        if name not in TRACKERS:
            raise UserError(f"train.trackers: there is no tracker '{name}', only {', '.join(TRACKERS)}")
        try:
            trackers[name] = TRACKERS[name](folder, config.model_dump(mode="json"), step)
        except (UserError, OSError):
            raise
        except Exception as error:
            raise UserError(f"train.trackers: {name} cannot record ({first_line(error)})") from error
    return trackers


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values of a tree by their paths, such as `validation/box_AP`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
