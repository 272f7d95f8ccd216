"""The records of a training: its metrics file, and trackers (TensorBoard, MLflow, Weights & Biases).

To add a tracker, write a class with the methods of `Tracker` and give it a name in `TRACKERS`.
"""

import contextlib
import importlib
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.files import read_json_object, write_atomically, write_text

PROJECT = "dimaskdino"
MOST_PARAMS = 100  # MLflow's limit for one request


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
        trackers: open trackers.
        samples: folder of the pictures.
    """

    def __init__(self, stream: TextIO | None, trackers: Sequence[Tracker], samples: Path) -> None:
        self.stream, self.trackers, self.samples = stream, trackers, samples

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which must have a `step`."""
        if self.stream is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.stream.write(json.dumps(record | {"time": now}) + "\n")
        self.stream.flush()
        values = record | record.get("losses", {}) | _flat({"validation": record.get("validation", {})}, "/")
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
        if numbers:
            for tracker in self.trackers:
                tracker.numbers(numbers, record["step"])

    def picture(self, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Write a picture of a step to the folder of samples."""
        if self.stream is None:
            return
        write_atomically(self.samples / f"step_{step:06d}.png", lambda path: Image.fromarray(pixels).save(path, "PNG"))
        for tracker in self.trackers:
            tracker.picture("samples", pixels, step)


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


class MLflow:
    """A run of MLflow; its environment variables name the server and the experiment."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        mlflow = _imported("mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        self._run = _recorded_id(folder, "mlflow")
        if self._run is None:
            experiment = mlflow.set_experiment(mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT)
            created = self._client.create_run(experiment.experiment_id, run_name=folder.name)
            self._run = created.info.run_id
            _record_id(folder, "mlflow", self._run)
            params = [mlflow.entities.Param(key, str(value)) for key, value in _flat(settings, ".").items()]
            for start in range(0, len(params), MOST_PARAMS):
                self._client.log_batch(self._run, params=params[start : start + MOST_PARAMS])
        else:
            self._client.update_run(self._run, status="RUNNING")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics)  # one request for all numbers of a step

    def picture(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        self._client.log_image(self._run, pixels, key=name.replace("/", "_"), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WeightsAndBiases:
    """A run of Weights & Biases, named after the run folder. Its environment variables apply."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._wandb = _imported("wandb")
        run = _recorded_id(folder, "wandb")
        if run is None:
            run = uuid.uuid4().hex[:8]
            _record_id(folder, "wandb", run)
        self._run = self._wandb.init(
            project=self._wandb.Settings().project or PROJECT,
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


class _Forgiving:
    """A tracker whose failure does not end the training: it is reported once, and nothing more is sent."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._failed = False

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self._tracker.numbers(values, step))

    def picture(self, name: str, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        self._try(lambda: self._tracker.picture(name, pixels, step))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # each package has its own exceptions
            self._failed = True
            print(f"note: {self._name} fails ({first_line(error)}); the training goes on without it", file=sys.stderr)


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases}


def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int) -> list[Tracker]:
    """Open the trackers of a training, or continue their records.

    Args:
        names: keys of `TRACKERS`.
        folder: the run folder.
        settings: all settings of the run, plain values.
        step: the step that the training starts or resumes from.

    Raises:
        UserError: a tracker's package is not installed, or it cannot record.
    """
    trackers: list[Tracker] = []
    for name in names:
        try:
            tracker = TRACKERS[name](folder, settings, step)
        except (UserError, OSError):
            raise
        except Exception as error:
            raise UserError(f"train.trackers: {name} cannot record ({first_line(error)})") from error
        # TensorBoard writes to the run folder, whose errors end the run
        trackers.append(tracker if isinstance(tracker, TensorBoard) else _Forgiving(name, tracker))
    return trackers


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"train.trackers: {name} is not installed: pip install {name}") from None


def _flat(tree: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree by their paths, such as `validation/box_AP`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, separator, f"{prefix}{name}{separator}")
        else:
            flat[prefix + name] = value
    return flat


def _recorded_id(folder: Path, tracker: str) -> str | None:
    """Return the tracker's own id of this run, so that a resumed training continues it."""
    return read_json_object(folder / "trackers.json").get(tracker)


def _record_id(folder: Path, tracker: str, run: str) -> None:
    file = folder / "trackers.json"
    write_text(file, json.dumps(read_json_object(file) | {tracker: run}, indent=1) + "\n")
