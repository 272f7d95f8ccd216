"""Helpers of the fault tests: trainings and commands in processes of their own, and small disks that can be full."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small import FILE, overrides

from dimaskdino.cli.training import train
from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.processes import launch_command

LONG = ("schedule.steps=5000", "schedule.drops=[4999]", "train.checkpoint_every=5000")
RUN_60 = ("schedule.steps=60", "train.checkpoint_every=2")


def process(folder: Path, data: Path, *changes: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
    """A training in a process of its own, or in several under torchrun, as `TrainingProcess` starts it."""
    arguments = ["train", *overrides(data, *changes), "--config", str(FILE), "--run", str(folder)]
    command, environment = launch_command(arguments, processes)
    if restarts:
        command.insert(command.index("--nnodes=1"), f"--max-restarts={restarts}")
    environment["OMP_NUM_THREADS"] = "1"  # more are slow while other tests run
    return _start(command, environment)


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )


def kit(*arguments: object) -> subprocess.Popen:
    """A command of the kit in a process of its own."""
    return _start([sys.executable, "-m", "dimaskdino", *map(str, arguments)], {"MPLBACKEND": "agg"})


def finish(running: subprocess.Popen) -> str:
    """What a process says that must end well."""
    output, _ = running.communicate(timeout=400)
    assert running.returncode == 0, output
    return output


def fail(running: subprocess.Popen, *wanted: str, code: int | None = None) -> str:
    """What a process says that must end badly, with these words in it and without a traceback."""
    output, _ = running.communicate(timeout=400)
    assert running.returncode != 0, output
    assert code is None or running.returncode == code, (running.returncode, output)
    for words in wanted:
        assert words in output, output
    assert not wanted or "Traceback" not in output, output
    return output


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.05)


def wait_for_step(run: RunFolder, step: int) -> None:
    wait_until(lambda: any(record["step"] >= step for record in run.read_metrics()))


def kill(running: subprocess.Popen) -> None:
    running.kill()
    running.communicate()


def assert_equal_models(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert different == []


def children(running: subprocess.Popen, word: str = "") -> list[psutil.Process]:
    """A process's descendants with a word in their command line."""
    found = psutil.Process(running.pid).children(recursive=True)
    return [child for child in found if word in " ".join(child.cmdline())]


@dataclass
class Scene:
    """Where a fault happens.

    Attributes:
        data: the small shapes data; not to be changed.
        folder: an empty folder.
    """

    data: Path
    folder: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    def start(self, *changes: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
        return process(self.run.path, self.data, *changes, processes=processes, restarts=restarts)

    def running(self, step: int, *changes: str, processes: int = 1, restarts: int = 0) -> subprocess.Popen:
        """A training that has reached a step."""
        trainer = self.start(*changes, processes=processes, restarts=restarts)
        wait_for_step(self.run, step)
        return trainer

    def undisturbed(self, *changes: str, processes: int = 1) -> Path:
        """The model that the same training ends with when nothing happens to it; scenes share it."""
        settings = hashlib.sha256(repr((changes, processes)).encode()).hexdigest()[:12]
        run = RunFolder(self.data.parent / f"undisturbed-{settings}")
        if not run.model.exists() and processes == 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as in a process of its own, whose start this saves
            try:
                train(overrides(self.data, *changes), str(FILE), str(run.path))
            finally:
                torch.set_num_threads(threads)
        elif not run.model.exists():
            finish(process(run.path, self.data, *changes, processes=processes))
        return run.model

    def resumed(self, *changes: str, processes: int = 1) -> str:
        """Run the same command again; it must end as an undisturbed training. Returns what it says."""
        output = finish(self.start(*changes, processes=processes))
        assert self.run.status()["state"] == "finished"
        assert_equal_models(self.run.model, self.undisturbed(*changes, processes=processes))
        return output

    @contextlib.contextmanager
    def disk(self, megabytes: int = 64) -> Iterator["Disk"]:
        """A small disk of its own."""
        path = self.folder / "disk"
        path.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
        if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("mounting a disk needs rights that this process does not have")
        try:
            yield Disk(path)
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)


@dataclass
class Disk:
    """A disk that can be full or read-only."""

    path: Path

    @contextlib.contextmanager
    def full(self, left: int = 0) -> Iterator[None]:
        """Fill it, all but some bytes, with a file that is deleted afterwards."""
        ballast = self.path / "ballast"
        with ballast.open("wb", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1))
            file.truncate(max(0, file.tell() - left))
        yield
        ballast.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,rw", str(self.path)], check=True)
