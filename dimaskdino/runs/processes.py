"""Training processes: torchrun as a subprocess, followed through its metrics file."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dimaskdino.errors import UserError
from dimaskdino.runs.folder import RunFolder

POLL_SECONDS = 0.5
STOP_SECONDS = 120  # a step of a large model on a CPU, and writing its checkpoint


def project_root() -> Path:
    """The folder that relative paths in notebooks refer to: the nearest parent with `configs/`, or the current one."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "configs").is_dir()), here)


def training_command(config: str, run: Path, overrides: Sequence[str], processes: int) -> list[str]:
    """The torchrun command line."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *("-m", "dimaskdino.training.launch", config, str(run), *overrides),
    ]


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the parent dies, so that a killed notebook kernel leaves no training behind."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class TrainingProcess:
    """A running training, a context manager: leaving it early stops the training cleanly.

    Args:
        config: name of a configuration, or a YAML file.
        run: the run folder.
        overrides: `key=value` settings.
        processes: number of processes, one per GPU.
        environment: additional environment variables, such as CUDA_VISIBLE_DEVICES.
    """

    def __init__(
        self,
        config: str,
        run: Path | str,
        overrides: Sequence[str] = (),
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = RunFolder(run)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with self.folder.log.open("a") as log:
            self.process = subprocess.Popen(
                training_command(config, self.folder.path, overrides, processes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupted cell must not interrupt it in the middle of a step
                preexec_fn=end_with_parent,
                env={"OMP_NUM_THREADS": str(_threads(processes))} | os.environ | (environment or {}),
            )

    def __enter__(self) -> "TrainingProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def follow(self) -> Iterator[list[dict[str, Any]]]:
        """Yield all metrics records whenever there are new ones, until the training ends.

        Raises:
            UserError: the training failed; the message is its own.
        """
        seen = -1
        while True:
            ended = self.process.poll() is not None
            records = self.folder.read_metrics()
            if len(records) != seen or ended:
                seen = len(records)
                yield records
            if ended:
                break
            time.sleep(POLL_SECONDS)
        status = self.folder.status()
        if self.process.returncode or status["state"] != "finished":
            reason = status.get("reason") or "no reason was recorded"
            raise UserError(f"the training did not finish: {reason}\n{self._last_lines()}")

    def _last_lines(self, count: int = 5) -> str:
        lines = self.folder.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        return "\n".join(["last lines of train.log:", *lines[-count:]])

    def stop(self) -> None:
        """Stop the training after its current step, with its state saved. Does nothing if it has ended."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _threads(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)
