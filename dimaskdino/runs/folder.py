"""A run folder: the files of one run, readable by people and programs during the run and afterwards.

config.yaml     the complete configuration        versions.json   python, packages, machine
metrics.jsonl   one record every few steps        tensorboard/    the same for tensorboard
checkpoints/    resume points, model.safetensors  figures/        figures of the notebooks
status.json     running, finished or failed, and why
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import psutil
import torch

from dimaskdino.config import Config, dump_config, load_config
from dimaskdino.errors import UserError

State = Literal["running", "finished", "failed"]
_PACKAGES = ("dimaskdino", "torch", "torchvision", "numpy", "pycocotools", "hotcoco", "papermill")


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; created when something is written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.checkpoints / "model.safetensors"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

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
        before = load_config(self.path / "config.yaml")
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

    def write_config(self, config: Config) -> None:
        """Write the configuration and the versions.

        Raises:
            UserError: the folder belongs to a run with another model, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / "config.yaml"
            if file.exists() and self.checkpoints.exists():
                self.check_config(config)
            file.write_text(dump_config(config))
            (self.path / "versions.json").write_text(json.dumps(versions(), indent=1))
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.path}: {error.strerror}") from None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Lock the folder for this process, and write a status that says how it ended, even after an exception.

        Raises:
            UserError: another process is using the folder.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            try:
                # not flock: loader processes would inherit it and keep it a while after this process was killed
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(
                    f"another run is using {self.path}; wait for it to end or choose another folder"
                ) from None
            process = psutil.Process()
            started = {"pid": process.pid, "process_started": process.create_time(), "started": _now()}
            self._write_status("running", **started)
            watcher = _watch(self.path, process.pid)
            try:
                yield
            except BaseException as error:
                reason = str(error) or type(error).__name__
                with contextlib.suppress(OSError):  # a full disk must not hide what happened
                    self._write_status("failed", reason=reason, started=started["started"], ended=_now())
                raise
            else:
                self._write_status("finished", started=started["started"], ended=_now())
            finally:
                watcher.terminate()
                watcher.wait()

    def _write_status(self, state: State, **details: Any) -> None:
        partial = self.path / "status.json.partial"
        partial.write_text(json.dumps({"state": state, **details}, indent=1))
        os.replace(partial, self.path / "status.json")

    def note_failure(self, reason: str) -> None:
        """Set the status to failed; an existing reason is kept."""
        if not (self.path / "status.json").exists() or self.status()["state"] != "failed":
            self._write_status("failed", reason=reason, ended=_now())

    def status(self) -> dict[str, Any]:
        """The status. A run whose process has vanished is failed."""
        file = self.path / "status.json"
        if not file.exists():
            return {"state": "failed", "reason": f"{self.path} holds no run"}
        status = json.loads(file.read_text())
        if status["state"] == "running" and not _alive(status["pid"], status["process_started"]):
            self._write_status("failed", reason=_KILLED, started=status["started"], ended=_now())
            return self.status()
        return status

    @contextlib.contextmanager
    def metrics(self, step: int, enabled: bool = True) -> Iterator["Metrics"]:
        """Open the metrics file; records after `step` are removed, since they belong to lost work."""
        if not enabled:
            yield Metrics(None, None)
            return
        kept = [json.dumps(r) + "\n" for r in self.read_metrics() if r["step"] <= step]
        file = self.path / "metrics.jsonl"
        file.write_text("".join(kept))
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by training alone

        with file.open("a") as stream, SummaryWriter(str(self.path / "tensorboard"), purge_step=step) as board:
            yield Metrics(stream, board)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All complete records."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text().split("\n")[:-1]  # what follows the last line end is still being written
        return [json.loads(line) for line in lines]


class Metrics:
    """Writes records: one line of json each, and their numbers to tensorboard."""

    def __init__(self, stream: TextIO | None, board: Any) -> None:
        self.stream, self.board = stream, board

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which must have a `step`."""
        if self.stream is None:
            return
        self.stream.write(json.dumps(record | {"time": _now()}) + "\n")
        self.stream.flush()
        flat = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        for name, value in (flat | record.get("losses", {})).items():
            self.board.add_scalar(name, value, record["step"])


_KILLED = "the process vanished; it was probably killed. Run the same command again to resume"


def _watch(folder: Path, pid: int) -> subprocess.Popen:
    """Start a small process that updates the status if another process dies without doing so."""
    return subprocess.Popen(
        [sys.executable, "-m", "dimaskdino.runs.watch", str(folder), str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it must outlive the watched process
    )


def _alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# settings that do not change what a training computes
_NEUTRAL = (
    *("data.root", "data.workers", "data.val", "data.resize"),
    *("train.accumulate", "train.compile", "train.checkpoint_activations", "train.checkpoint_every", "train.log_every"),
    "evaluation",
)
# settings that do not change what the weights mean, so that a resumed run may change them; steps only grow
_RESUMABLE = ("data.skip_bad_images", "optimizer.lr", "schedule.steps", "train.batch_size", "train.precision")


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
