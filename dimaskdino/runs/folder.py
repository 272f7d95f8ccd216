"""A run folder: the files of one run, readable by people and programs during the run and afterwards.

config.yaml     the complete configuration        versions.json   python, packages, machine
metrics.jsonl   one record every few steps        tensorboard/    the same for TensorBoard
checkpoints/    resume points, model.safetensors  figures/        figures of the notebooks
samples/        detections in a few validation images, a picture per validation
status.json     running, finished, stopped or failed, and why
lock            held while a process writes to the folder

Small files are written atomically. Those that a crash has damaged are left out when read, never in the way.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import filelock
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dimaskdino.config import Config, dump_config, load_config, read_tree
from dimaskdino.runs.trackers import Tracker, open_trackers
from dimaskdino.utils.errors import Stopped, UserError, explain_os_error, writing
from dimaskdino.utils.files import parse_json_object, read_json_object, write_atomically, write_text

State = Literal["running", "finished", "stopped", "failed"]
LOCK_SECONDS = 5.0  # a reader of the status holds the lock for an instant
PROBE_SECONDS = 0.2
_PACKAGES = ("dimaskdino", "torch", "torchvision", "numpy", "pycocotools", "hotcoco", "papermill")


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; created when something is written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._started: dict[str, Any] = {}
        self._is_finished = False  # by an earlier process, and this one has not changed it

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.checkpoints / "model.safetensors"

    @property
    def best(self) -> Path:
        """The weights with the best validation, if the training validates."""
        return self.checkpoints / "best.safetensors"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def samples(self) -> Path:
        """Pictures of detections in validation images, one per validation."""
        return self.path / "samples"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    def check_config(self, config: Config, same_result: bool = False) -> None:
        """Check that a run with this configuration may resume the run in this folder.

        Args:
            config: the configuration.
            same_result: also require the settings that a resumed run may change, such as the learning rate: the result
                of the run in this folder is to stand for this configuration.

        Raises:
            UserError: settings that matter differ.
        """
        before = self._config_before()
        if before is None:
            return
        free = _NEUTRAL if same_result else (*_NEUTRAL, *_RESUMABLE)
        changed = [
            key
            for key in changed_settings(before.model_dump(mode="json"), config.model_dump(mode="json"))
            if not any(key == name or key.startswith(f"{name}.") for name in free)
        ]
        if config.schedule.steps < before.schedule.steps:
            changed = [*dict.fromkeys([*changed, "schedule.steps"])]
        if changed:
            raise UserError(
                f"{self.path} holds a run with other settings ({', '.join(changed[:5])}); resuming needs the same "
                "settings. Use another folder, or delete this one"
            )

    def _config_before(self) -> Config | None:
        """The configuration of the run in this folder: config.yaml or, if that is damaged, the checkpoints' copy."""
        with contextlib.suppress(UserError):
            if Config.model_fields.keys() <= read_tree(self.path / "config.yaml").keys():
                return load_config(self.path / "config.yaml")
        from dimaskdino.checkpoints.model_files import recorded_config  # with PyTorch, which is rarely needed here

        return recorded_config(self.path)

    def write_config(self, config: Config) -> None:
        """Write the configuration and the versions. A file that says the same, with comments perhaps, stays.

        Raises:
            UserError: the folder belongs to a run with another model, or cannot be written.
        """
        if self.checkpoints.exists():
            self.check_config(config)
        if self._written_config() != config:
            write_text(self.path / "config.yaml", dump_config(config))
        write_text(self.path / "versions.json", json.dumps(versions(), indent=1))

    def _written_config(self) -> Config | None:
        with contextlib.suppress(UserError):
            return load_config(self.path / "config.yaml")
        return None

    @contextlib.contextmanager
    def running(self, keep_finished: bool = False) -> Iterator[None]:
        """Lock the folder for this process, and write a status that says how it ended, even after an exception.

        Args:
            keep_finished: a finished run stays finished until `reopen` is called, so that a command that is refused
                does not spoil it.

        Raises:
            UserError: another process is using the folder, or it cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except filelock.Timeout:
            raise UserError(f"another run is using {self.path}; wait for it to end or choose another folder") from None
        except OSError as error:
            raise UserError(f"cannot lock {self.path}: {explain_os_error(error)}") from None
        except NotImplementedError:  # filelock's word for ENOSYS
            raise UserError(
                f"cannot lock {self.path}: the file system has no locks; choose a folder on a local disk"
            ) from None
        try:
            self._started = {"started": _now(), "pid": os.getpid(), "host": platform.node(), "boot": _boot()}
            self._is_finished = keep_finished and self.status()["state"] == "finished"
            if not self._is_finished:
                self._write_status("running", **self._started)
            try:
                yield
            except BaseException as error:
                if not self._is_finished:
                    state: State = "stopped" if isinstance(error, Stopped) else "failed"
                    reason = _reason(error, self.path)
                    with contextlib.suppress(UserError):  # a full disk must not hide what happened
                        self._write_status(state, reason=reason, started=self._started["started"], ended=_now())
                raise
            else:
                self._write_status("finished", started=self._started["started"], ended=_now())
        finally:
            lock.release()

    def reopen(self) -> None:
        """Change a finished run: from now on its status is that of this process. Other runs are open already."""
        if self._is_finished:
            self._is_finished = False
            self._write_status("running", **self._started)

    def _lock(self) -> filelock.BaseFileLock:
        # the system releases it when the process ends, however it ends; forked loader processes do not keep it
        return filelock.FileLock(self.path / "lock", preserve_lock_file=True, fallback_to_soft=False)

    def _is_locked(self) -> bool | None:
        """Whether a process holds the folder's lock; None if that cannot be told, as on a read-only disk."""
        if not (self.path / "lock").exists():
            return None
        lock = self._lock()
        try:
            lock.acquire(timeout=PROBE_SECONDS)  # other readers hold it for an instant
        except filelock.Timeout:
            return True
        except (OSError, NotImplementedError):
            return None
        lock.release()
        return False

    def _write_status(self, state: State, **details: Any) -> None:
        file, text = self.path / "status.json", json.dumps({"state": state, **details}, indent=1)
        try:
            write_text(file, text)
        except UserError:
            if not file.exists():
                raise
            # on a full disk the old file's own block is still there to be used
            try:
                with file.open("r+") as stream:
                    stream.write(text)
                    stream.truncate()
            except OSError as error:
                raise UserError(f"cannot write {file}: {explain_os_error(error)}") from None

    def note_failure(self, reason: str, since: float) -> None:
        """Set the status to failed, unless the folder's status is another run's, or says itself what happened.

        Args:
            reason: what failed.
            since: when the work began that failed, as `time.time` gives it. A run that finished before stays finished.
        """
        state = self.status()["state"]
        explained = state in ("failed", "stopped") and self.ended_since(since)
        finished_before = state == "finished" and not self.ended_since(since)
        if state != "running" and not explained and not finished_before:
            self._write_status("failed", reason=reason, ended=_now())

    def ended_since(self, since: float) -> bool:
        """Whether the run has ended after a moment, which `time.time` gave."""
        return self.status().get("ended", "") >= _now(since)

    def status(self) -> dict[str, Any]:
        """How the run is going: `state`, and `reason`, `started`, `ended`, `note` where there is one. Writes nothing.

        A run that says `running` and holds no lock on its folder has vanished, so it is failed. Where the lock says
        nothing, as seen from another machine, the state stays `running` and `note` says so.
        """
        status = self._recorded_status()
        if status["state"] != "running" or (locked := self._is_locked()):
            return status
        status = self._recorded_status()  # a run that ended in the meantime wrote how before it gave up its lock
        if status["state"] != "running":
            return status
        # the same start of the same machine sees its locks, from every container; another machine may not
        elsewhere = status.get("boot") != _boot() and status.get("host") != platform.node()
        if locked is None or elsewhere:
            where = status.get("host", "another machine")
            return status | {"note": f"as {where} left it; whether it still runs cannot be told from here"}
        return {"state": "failed", "reason": _VANISHED} | {k: status[k] for k in ("started",) if k in status}

    def _recorded_status(self) -> dict[str, Any]:
        file = self.path / "status.json"
        if not file.exists():
            return {"state": "failed", "reason": f"{self.path} holds no run"}
        status = read_json_object(file)
        if not isinstance(status.get("state"), str):
            reason = f"{file} is damaged; run the same command again to resume from the last checkpoint"
            return {"state": "failed", "reason": reason}
        return status

    @contextlib.contextmanager
    def metrics(
        self, step: int, enabled: bool = True, trackers: Sequence[str] = (), settings: Mapping[str, Any] | None = None
    ) -> Iterator["Metrics"]:
        """Open the metrics file; records after `step` are removed, since they belong to lost work.

        Args:
            step: the step that the training starts or resumes from.
            enabled: whether this process records anything.
            trackers: what receives the records too, see `dimaskdino.runs.trackers`.
            settings: all settings of the run, for the trackers.

        Raises:
            UserError: the file cannot be written, or a tracker is not installed.
        """
        if not enabled:
            yield Metrics(None, [], self.samples)
            return
        self.reopen()
        kept = [json.dumps(r) + "\n" for r in self.read_metrics() if r["step"] <= step]
        file = self.path / "metrics.jsonl"
        write_text(file, "".join(kept))
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(file.open("a"))
            stack.enter_context(_one_report_of_disk_errors())
            opened = open_trackers(trackers, self.path, settings or {}, step)
            for tracker in opened:
                stack.callback(tracker.close)
            yield Metrics(stream, opened, self.samples)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete records; damaged lines are left out."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(errors="replace").split("\n")[:-1]  # after the last line end: still being written
        records = (parse_json_object(line) for line in lines)
        return [record for record in records if isinstance(record.get("step"), int)]


@contextlib.contextmanager
def _one_report_of_disk_errors() -> Iterator[None]:
    """Keep tensorboard's thread from printing a traceback of a full disk, which the main thread reports in one line."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


class Metrics:
    """Writes records, one line of json each, and pictures; their numbers and the pictures go to the trackers too."""

    def __init__(self, stream: TextIO | None, trackers: Sequence[Tracker], samples: Path) -> None:
        self.stream, self.trackers, self.samples = stream, trackers, samples

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which must have a `step`."""
        if self.stream is None:
            return
        self.stream.write(json.dumps(record | {"time": _now()}) + "\n")
        self.stream.flush()
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        numbers |= _flat(record.get("validation", {}), "validation")
        numbers |= record.get("losses", {})
        if numbers:
            for tracker in self.trackers:
                tracker.numbers(numbers, record["step"])

    def picture(self, pixels: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Write a picture of a step to `samples/`."""
        if self.stream is None:
            return
        write_atomically(self.samples / f"step_{step:06d}.png", lambda path: Image.fromarray(pixels).save(path, "PNG"))
        for tracker in self.trackers:
            tracker.picture("samples", pixels, step)


def _flat(record: dict[str, Any], name: str) -> dict[str, float]:
    """The numbers of a record by their paths, such as `validation/box_AP`."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        path = f"{name}/{key}"
        if isinstance(value, dict):
            numbers |= _flat(value, path)
        elif value is not None:
            numbers[path] = value
    return numbers


_VANISHED = "the process vanished; it was probably killed. Run the same command again to resume"


def _reason(error: BaseException, folder: Path) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or folder}: {explain_os_error(error)}"
    return str(error) or type(error).__name__


def _boot() -> str | None:
    """An identifier of this start of the machine, the same in all containers on it; None outside Linux."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _now(seconds: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


# settings that do not change what a training computes
_NEUTRAL = (
    *("data.root", "data.workers", "data.val", "data.resize"),
    *("train.accumulate", "train.compile", "train.checkpoint_activations"),
    *("train.checkpoint_every", "train.keep", "train.log_every", "train.trackers", "train.validation", "evaluation"),
)
# settings that do not change what the weights mean, so that a resumed run may change them; steps only grow
_RESUMABLE = (
    "data.skip_bad_images",
    "optimizer.lr",
    "schedule.steps",
    "train.average",
    "train.batch_size",
    "train.precision",
)


def distinct_names(paths: Sequence[Path | str]) -> list[str]:
    """A short name for each path: its last part, with as many parts before it as tell all of them apart.

    Raises:
        UserError: a path is there twice.
    """
    absolute = [Path(path).absolute() for path in paths]
    for path in absolute:
        if absolute.count(path) > 1:
            raise UserError(f"{path} is listed twice")
    for length in range(1, max((len(path.parts) for path in absolute), default=1) + 1):
        names = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(names)) == len(names):
            break
    return names if paths else []


def changed_settings(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings that differ between two configurations (as plain values), by key, with their new values."""
    changed: dict[str, Any] = {}
    for name, value in after.items():
        key = prefix + name
        if name in before and before[name] == value:
            continue
        if isinstance(value, dict) and isinstance(before.get(name), dict):
            changed |= changed_settings(before[name], value, f"{key}.")
        else:
            changed[key] = value
    return changed


def versions() -> dict[str, Any]:
    """Versions and machine, as `environment`, and the command."""
    return environment() | {"command": sys.argv}


def environment() -> dict[str, Any]:
    """Python, packages, machine and devices, on which measurements depend."""
    import torch  # here, so that a run folder is looked at without waiting for it

    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    packages["torch"] = torch.__version__  # with the kind of build, which the metadata leave out
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "devices": devices,
    }
