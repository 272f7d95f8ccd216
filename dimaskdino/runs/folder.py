"""A run folder: the files of one run.

config.yaml     the complete configuration        versions.json   python, packages, machine
metrics.jsonl   one record every few steps        tensorboard/    the same for TensorBoard
checkpoints/    resume points, model.safetensors  figures/        figures of the notebooks
samples/        detections in a few validation images, a picture per validation
status.json     running, finished, stopped or failed, and why
lock            held while a process writes to the folder

Small files are written atomically. Readers leave out what a crash has damaged.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import filelock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dimaskdino.config import Config, dump_config, load_config, read_tree
from dimaskdino.runs.trackers import Metrics, hide_disk_errors_of_threads, open_trackers
from dimaskdino.utils import plugins
from dimaskdino.utils.errors import Stopped, UserError, explain_os_error, writing
from dimaskdino.utils.files import parse_json_object, read_json_object, read_text, write_text

State = Literal["running", "finished", "stopped", "failed"]
LOCK_SECONDS = 5.0  # a reader of the status holds the lock for an instant
PROBE_SECONDS = 0.2
_VANISHED = "the process vanished; it was probably killed. Run the same command again to resume"
_PACKAGES = ("dimaskdino", "torch", "torchvision", "numpy", "pycocotools", "hotcoco", "papermill")
# settings that do not change what a training computes
_NEUTRAL = (
    *("data.root", "data.workers", "data.val", "data.resize"),
    *("train.accumulate", "train.compile", "train.checkpoint_activations"),
    *("train.checkpoint_every", "train.keep", "train.log_every", "train.trackers", "train.validation", "evaluation"),
)
# settings that a resumed run may change, since the weights keep their meaning; the number of steps may only grow
_RESUMABLE = (
    *("data.skip_bad_images", "optimizer.lr", "schedule.steps"),
    *("train.average", "train.batch_size", "train.precision"),
)


class _Validation(BaseModel):
    model_config = ConfigDict(strict=True)

    box: float | None = Field(alias="box_AP")
    mask: float | None = Field(alias="mask_AP")
    stages: dict[str, dict[str, float | None]] = {}


class _Record(BaseModel):
    """The types of what is read in a record of the metrics; all but the step may be missing."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0, le=2**53)
    loss: float = 0
    losses: dict[str, float] = {}
    seconds_per_step: float = 0
    validation: _Validation = Field(default_factory=lambda: _Validation(box_AP=0, mask_AP=0))
    best_step: int = 0


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; created when something is written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._started: dict[str, Any] = {}
        self._locked_file: int | None = None  # inode of the lock that this process holds
        self._is_finished = False  # by an earlier process, and unchanged since

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
            same_result: also require the settings that a resumed run may change, such as the learning rate, so that
                the result in this folder is that of this configuration.

        Raises:
            UserError: settings that matter differ.
        """
        before = self._config_before()
        if before is not None:
            check_settings(before, config, self.path, same_result)

    def _config_before(self) -> Config | None:
        """Read the configuration of the run in this folder: config.yaml or, if it is damaged, the checkpoints' copy."""
        with contextlib.suppress(UserError):
            if Config.model_fields.keys() <= read_tree(self.path / "config.yaml").keys():
                return load_config(self.path / "config.yaml")
        from dimaskdino.checkpoints.model_files import recorded_config  # imports PyTorch, which is rarely needed here

        return recorded_config(self.path)

    def write_config(self, config: Config) -> None:
        """Write the configuration and the versions. A config.yaml with the same settings keeps its comments.

        Raises:
            UserError: the folder belongs to a run with other settings, holds a model that a training would replace, or
                cannot be written.
        """
        if self.checkpoints.exists():
            self.check_start()
            self.check_config(config)
        written = None
        with contextlib.suppress(UserError):
            written = load_config(self.path / "config.yaml")
        if written != config:
            write_text(self.path / "config.yaml", dump_config(config))
        versions = environment() | {"command": sys.argv}
        if hashes := plugins.hashes():
            before = read_json_object(self.path / "versions.json").get("plugins", {})
            for module, digest in hashes.items():
                if before.get(module, digest) != digest:
                    print(f"note: {module} has changed since this run started")
            versions["plugins"] = hashes | before  # those that the run started with
        write_text(self.path / "versions.json", json.dumps(versions, indent=1))

    @contextlib.contextmanager
    def running(self, keep_finished: bool = False) -> Iterator[None]:
        """Lock the folder for this process, and write a status that says how it ended, even after an exception.

        Args:
            keep_finished: a finished run keeps its status until `reopen` is called, so that a command that is refused
                does not overwrite it.

        Raises:
            UserError: another process is using the folder, or it cannot be written.
        """
        busy = f"another run is using {self.path}; wait for it to end or choose another folder"
        with locked(self.path / "lock", busy):
            self._locked_file = (self.path / "lock").stat().st_ino
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
                        reason = str(error) or type(error).__name__
                        if isinstance(error, OSError) and error.errno is not None:
                            reason = f"{error.filename or self.path}: {explain_os_error(error)}"
                        with contextlib.suppress(UserError):  # a full disk must not hide the error
                            self._write_status(state, reason=reason, started=self._started["started"], ended=_now())
                    raise
                self._write_status("finished", started=self._started["started"], ended=_now())
            finally:
                self._locked_file = None

    def check_lock(self) -> None:
        """Check that no other process can have locked the folder since this one did, before something is replaced.

        Raises:
            UserError: the lock file was deleted or replaced.
        """
        file = self.path / "lock"
        if self._locked_file is not None and (not file.exists() or file.stat().st_ino != self._locked_file):
            raise UserError(
                f"{file} was deleted, so another process may be writing to {self.path}; nothing more is written. End "
                "all of them, then run one command again"
            )

    def check_start(self) -> None:
        """Check that a training in this folder replaces no trained model.

        Raises:
            UserError: there is a trained model, but no resume point.
        """
        from dimaskdino.checkpoints.model_files import resume_points  # imports PyTorch, which is rarely needed here

        if self.model.exists() and not resume_points(self.checkpoints):
            raise UserError(
                f"{self.model} is a trained model without a resume point, and a training would replace it; choose "
                f"another folder (train.weights={self.path} starts from this model)"
            )

    def reopen(self) -> None:
        """Give a finished run the status of this process, which changes it. No-op for other runs."""
        if self._is_finished:
            self._is_finished = False
            self._write_status("running", **self._started)

    def _is_locked(self) -> bool | None:
        """Whether a process holds the folder's lock; None if it cannot be checked, as on a read-only disk."""
        if not (self.path / "lock").exists():
            return None
        lock = _lock(self.path / "lock")
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
            # on a full disk the block of the old file can still be written
            try:
                with file.open("r+", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.truncate()
            except OSError as error:
                raise UserError(f"cannot write {file}: {explain_os_error(error)}") from None

    def note_failure(self, reason: str, since: float) -> None:
        """Set the status to failed, unless another process runs, or the status already explains the failure.

        Args:
            reason: what failed.
            since: start of the work that failed, in seconds as from `time.time`. A run that finished before it stays
                finished.
        """
        state = self.status()["state"]
        explained = state in ("failed", "stopped") and self.ended_since(since)
        finished_before = state == "finished" and not self.ended_since(since)
        if state != "running" and not explained and not finished_before:
            self._write_status("failed", reason=reason, ended=_now())

    def ended_since(self, since: float) -> bool:
        """Whether the run has ended after a time, in seconds as from `time.time`."""
        with contextlib.suppress(KeyError, TypeError, ValueError):  # it has not ended, or the file is damaged
            return datetime.fromisoformat(self.status()["ended"]).timestamp() >= int(since)  # written in whole seconds
        return False

    def status(self) -> dict[str, Any]:
        """Return the `state` of the run, and `reason`, `started`, `ended`, `note` where there is one.

        A run that says `running` without holding its lock has vanished, so it counts as failed. Where the lock cannot
        be checked, as from another machine, the state stays `running` and `note` says so. Nothing is written.
        """
        status = self._recorded_status()
        if status["state"] != "running" or (locked := self._is_locked()):
            return status
        status = self._recorded_status()  # a run that has just ended wrote its status before it released its lock
        if status["state"] != "running":
            return status
        # containers of one machine see each other's locks; another machine, or this one after a restart, may not
        elsewhere = status.get("boot") != _boot() and status.get("host") != platform.node()
        if locked is None or elsewhere:
            where = status.get("host", "another machine")
            return status | {"note": f"written on {where}; its lock cannot be checked from this machine"}
        vanished = {"state": "failed", "reason": _VANISHED}
        return vanished | {"started": status["started"]} if "started" in status else vanished

    def _recorded_status(self) -> dict[str, Any]:
        file = self.path / "status.json"
        if not file.exists() and (self.path / "config.yaml").exists():
            return {"state": "not started", "reason": f"start it with 'dimaskdino train --run {self.path}'"}
        if not file.exists():
            return {"state": "failed", "reason": f"{self.path} holds no run"}
        status = read_json_object(file)
        if not isinstance(status.get("state"), str):
            reason = f"{file} is damaged; run the same command again to resume from the last checkpoint"
            return {"state": "failed", "reason": reason}
        return status

    @contextlib.contextmanager
    def metrics(self, step: int, config: Config | None = None, enabled: bool = True) -> Iterator[Metrics]:
        """Open the metrics file, and remove records after `step`, since they belong to lost work.

        Args:
            step: the step that the training starts or resumes from.
            config: all settings of the run; its trackers receive the records too.
            enabled: whether this process records anything.

        Raises:
            UserError: the file cannot be written, or a tracker cannot record.
        """
        if not enabled:
            yield Metrics(None, {}, self.samples)
            return
        self.reopen()
        file = self.path / "metrics.jsonl"
        kept = [json.dumps(record) + "\n" for record in self.read_metrics() if record["step"] <= step]
        write_text(file, "".join(kept))
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(file.open("a", encoding="utf-8"))
            stack.enter_context(hide_disk_errors_of_threads())
            trackers = open_trackers(config, self.path, step) if config else {}
            metrics = Metrics(stream, trackers, self.samples)
            stack.callback(metrics.close)
            yield metrics

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read all complete records; damaged lines are left out."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        records = []
        for line in read_text(file, errors="replace").split("\n")[:-1]:  # the last line may still be written
            record = parse_json_object(line)
            with contextlib.suppress(ValidationError):
                _Record.model_validate(record)
                records.append(record)
        return records


def _lock(file: Path) -> filelock.BaseFileLock:
    # the system releases it when the process ends, however it ends; forked loader processes do not keep it
    return filelock.FileLock(file, preserve_lock_file=True, fallback_to_soft=False)


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Keep other processes out of a folder, which is created if it is missing.

    Args:
        file: the lock, in that folder.
        busy: what to tell a user if another process holds it.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(file)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except filelock.Timeout:
        raise UserError(busy) from None
    except OSError as error:
        raise UserError(f"cannot lock {file.parent}: {explain_os_error(error)}") from None
    except NotImplementedError:  # from filelock, for ENOSYS
        raise UserError(
            f"cannot lock {file.parent}: the file system has no locks; choose a folder on a local disk"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _boot() -> str | None:
    """Return the identifier of this start of the machine, the same in its containers; None outside Linux."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def check_settings(before: Config, config: Config, where: Path, same_result: bool = False) -> None:
    """Check that a run with a configuration may resume, or stand for, a run that was made with another.

    Args:
        before: the configuration of the earlier run.
        config: the configuration.
        where: what holds the earlier run, for the message.
        same_result: also require the settings that a resumed run may change, such as the learning rate.

    Raises:
        UserError: settings that matter differ.
    """
    free = _NEUTRAL if same_result else (*_NEUTRAL, *_RESUMABLE)
    changed = []
    for key in changed_settings(before.model_dump(mode="json"), config.model_dump(mode="json")):
        shorter = key == "schedule.steps" and config.schedule.steps < before.schedule.steps
        if shorter or not any(key == name or key.startswith(f"{name}.") for name in free):
            changed.append(key)
    if changed:
        raise UserError(
            f"{where} holds a run with other settings ({', '.join(changed[:5])}); resuming needs the same "
            "settings. Use another folder, or delete this one"
        )


def distinct_names(paths: Sequence[Path | str]) -> list[str]:
    """Return a short name for each path: its last part, preceded by as many parts as distinguish all of them.

    Raises:
        UserError: a path is listed twice.
    """
    absolute = [Path(path).absolute() for path in paths]
    for path in absolute:
        if absolute.count(path) > 1:
            raise UserError(f"{path} is listed twice")
    names, length = [path.name for path in absolute], 1
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in absolute]
    return names


def changed_settings(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings that differ between two configurations (plain values), by key, with their new values.

    The new value of a setting that only the first has, such as a loss term that was removed, is None.
    """
    changed: dict[str, Any] = {}
    for name in (*after, *(before.keys() - after.keys())):
        key, old, new = prefix + name, before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= changed_settings(old, new, f"{key}.")
        elif name not in before or name not in after or old != new:
            changed[key] = new
    return changed


def environment() -> dict[str, Any]:
    """Return the versions of Python and packages, the machine and its devices, on which measurements depend."""
    import torch  # imported here, since reading a run folder needs no PyTorch

    packages = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    packages["torch"] = torch.__version__  # names the kind of build, which the metadata leave out
    return {
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
