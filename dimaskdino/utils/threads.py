"""Adapting the number of PyTorch's threads to the free cores.

PyTorch's threads wait for each other after every operation. If one shares its core with another program, all of them
wait, and a step becomes several times slower (docs/performance.md). So the number of threads follows the load of the
machine while the model computes. `OMP_NUM_THREADS` or `torch.set_num_threads` fixes the number; results then repeat
bit for bit, since the order of sums depends on the number of threads.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

INTERVAL = 0.5  # seconds between two readings of the load


@dataclass(frozen=True)
class _Reading:
    """Seconds that all cores together were busy since the machine started, and those of this process."""

    time: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> "_Reading":
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        # on Linux `user` includes guests; time that a hypervisor takes ("steal") counts as busy
        kinds = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
        busy = sum(getattr(times, kind, 0.0) for kind in kinds)
        return cls(time.monotonic(), busy, own.user + own.system)


def available_cores() -> int:
    """Return the number of cores that this process may use, which a scheduler may limit."""
    affinity = getattr(psutil.Process(), "cpu_affinity", None)  # not on macOS
    return len(affinity()) if affinity else psutil.cpu_count() or 1


def available_memory(system: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use, which a container or a scheduler may limit.

    Args:
        system: the folder that holds `proc` and `sys`, where Linux keeps the limits.
    """
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):  # not on Linux
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            # version 2 has one tree for all controllers, version 1 one for each
            top, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            if top not in controllers.split(","):
                continue
            place = system / "sys/fs/cgroup" / top / group.lstrip("/")
            # the groups around it count too; a container may see its own group as the top
            for folder in (place, *place.parents):
                with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
                    limits.append(int((folder / name).read_text()))
    return min(limits)


def thread_count(cores: int, others: float, most: int) -> int:
    """Return the number of threads to compute with under CPU load.

    Args:
        cores: number of cores of the machine.
        others: mean number of cores that other programs keep busy.
        most: number of threads on an idle machine.
    """
    return min(most, max(1, int(cores - others + 0.5)))


@dataclass
class ThreadControl:
    """Adapts the number of PyTorch's threads to the load while a block runs.

    Attributes:
        most: number of threads on an idle machine; PyTorch's default.
        fixed: whether the user chose the number.
    """

    most: int = field(default_factory=torch.get_num_threads)
    fixed: bool = field(default_factory=lambda: bool({"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)))
    _last: _Reading = field(default_factory=_Reading.now)
    _chosen: int = 0

    def choose(self) -> int:
        """Return the number of threads for the load since the last reading."""
        if time.monotonic() - self._last.time >= INTERVAL:
            now, last = _Reading.now(), self._last
            others = (now.busy - last.busy - (now.own - last.own)) / (now.time - last.time)
            self._chosen, self._last = thread_count(psutil.cpu_count() or 1, others, self.most), now
        return self._chosen or self.most

    @contextmanager
    def adaptive_threads(self) -> Iterator[None]:
        """Use the free cores only in this block."""
        if self.fixed or self.most == 1 or torch.get_num_threads() != self.most:
            yield
            return
        torch.set_num_threads(self.choose())
        try:
            yield
        finally:
            torch.set_num_threads(self.most)


adaptive_threads = ThreadControl().adaptive_threads
