"""Starting training processes, following them through their metrics, and stopping them."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from dimaskdino.runs.folder import RunFolder
from dimaskdino.utils.errors import Stopped, UserError, writing
from dimaskdino.utils.signals import STOP_SECONDS, child_environment

POLL_SECONDS = 0.5


def project_root() -> Path:
    """Return the folder that paths in notebooks are relative to: the kit's clone around the current one, or that."""
    here = Path.cwd()
    clones = (folder for folder in (here, *here.parents) if (folder / "dimaskdino" / "__init__.py").is_file())
    return next((folder for folder in clones if (folder / "configs").is_dir()), here)


def launch_command(arguments: Sequence[str], processes: int) -> tuple[list[str], dict[str, str]]:
    """Return the command and the additional environment that run `dimaskdino` in several processes on this machine.

    Several run under torchrun and share the cores. They find each other
    through a file that only this user can read, and connect over the loopback interface only.
    """
    command = [sys.executable, "-m"]
    if processes == 1:
        return [*command, "dimaskdino", *arguments], {}
    from dimaskdino.utils.distributed import STORE  # imports PyTorch, which the other case does not need

    meeting = Path(tempfile.mkdtemp(prefix="dimaskdino-"))
    torchrun = [
        *("torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}", "--local-addr=127.0.0.1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={meeting / 'torchrun'}", "--rdzv-conf=store_type=file"),
        # after "--", torchrun does not take --run for a beginning of its own --run-path
        *(f"--rdzv-id={meeting.name}", "-m", "--", "dimaskdino"),
    ]
    defaults = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    for name, addresses in psutil.net_if_addrs().items():
        if "127.0.0.1" in [address.address for address in addresses]:
            defaults |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    environment = {name: os.environ.get(name, value) for name, value in defaults.items()}
    environment |= {STORE: str(meeting / "workers"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONSAFEPATH": "1"}
    return [*command, *torchrun, *arguments], environment


class TrainingProcess:
    """A running training. As a context manager it stops the training cleanly when it is left early.

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
        with writing(self.folder.path):
            self.folder.path.mkdir(parents=True, exist_ok=True)
        arguments = ["train", *overrides, "--config", config, "--run", str(self.folder.path)]
        command, needed = launch_command(arguments, processes)
        with writing(self.folder.log), self.folder.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupted cell must not interrupt a step
                env=os.environ | needed | child_environment() | dict(environment or {}),
            )

    def __enter__(self) -> "TrainingProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def follow(self) -> Iterator[list[dict[str, Any]]]:
        """Yield all metrics records whenever there are new ones, until the training ends.

        Raises:
            UserError: the training failed; the message is its own.
            Stopped: the training was asked to stop and has saved its state.
        """
        seen, ended = -1, False
        while not ended:
            ended = self.process.poll() is not None
            records = self.folder.read_metrics()
            if len(records) != seen or ended:
                seen = len(records)
                yield records
            if not ended:
                time.sleep(POLL_SECONDS)
        status = self.folder.status()
        if status["state"] == "stopped":
            raise Stopped(status.get("reason", "stopped"))
        if self.process.returncode or status["state"] != "finished":
            reason = status.get("reason") or "no reason was recorded"
            last_lines = self.folder.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise UserError(f"the training did not finish: {reason}", "end of train.log:", *last_lines)

    def stop(self) -> None:
        """Stop the training after its current step, with its state saved. No-op if it has ended."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(self.process.pid).children(recursive=True):
                    process.kill()
            self.process.kill()
            self.process.wait()
