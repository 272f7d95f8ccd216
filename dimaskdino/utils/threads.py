"""Computing threads: as many as there are free cores.

PyTorch's threads wait for each other after every operation. If one of them has to share its core with another program,
all of them wait, and a step takes many times as long as its share of the cores would allow (docs/performance.md). So
while the model computes, the number of threads follows the load of the machine. `OMP_NUM_THREADS`, or
`torch.set_num_threads`, fixes the number instead; then results repeat bit for bit, since the order of sums depends on
the number of threads.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

INTERVAL = 0.5  # seconds between two looks at the load


@dataclass(frozen=True)
class _Reading:
    """Seconds of all cores together since the machine started, in use and by this process."""

    time: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> "_Reading":
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        # on Linux `user` includes guests; what a hypervisor takes away is busy, too
        kinds = ("user", "nice", "system", "irq", "softirq", "steal", "interrupt", "dpc")
        busy = sum(getattr(times, kind, 0.0) for kind in kinds)
        return cls(time.monotonic(), busy, own.user + own.system)


def available_cores() -> int:
    """Number of cores that this process may use, which a container or a scheduler may bound."""
    affinity = getattr(psutil.Process(), "cpu_affinity", None)  # not on macOS
    return len(affinity()) if affinity else psutil.cpu_count() or 1


def thread_count(cores: int, others: float, most: int) -> int:
    """Number of threads beside other programs.

    Args:
        cores: number of cores of the machine.
        others: cores that other programs keep busy, on average.
        most: number of threads on an idle machine.
    """
    return min(most, max(1, int(cores - others + 0.5)))


@dataclass
class ThreadControl:
    """The number of computing threads, adapted to the load while a block runs.

    Attributes:
        most: number of threads on an idle machine; PyTorch's default.
        fixed: whether the number was chosen by the user.
    """

    most: int = field(default_factory=torch.get_num_threads)
    fixed: bool = field(default_factory=lambda: bool({"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)))
    _last: _Reading = field(default_factory=_Reading.now)
    _chosen: int = 0

    def choose(self) -> int:
        """The number of threads for the load since the last look."""
        if time.monotonic() - self._last.time >= INTERVAL:
            now, last = _Reading.now(), self._last
            others = (now.busy - last.busy - (now.own - last.own)) / (now.time - last.time)
            self._chosen, self._last = thread_count(psutil.cpu_count() or 1, others, self.most), now
        return self._chosen or self.most

    @contextmanager
    def adaptive_threads(self) -> Iterator[None]:
        """Compute with the free cores in this block."""
        if self.fixed or self.most == 1 or torch.get_num_threads() != self.most:
            yield
            return
        torch.set_num_threads(self.choose())
        try:
            yield
        finally:
            torch.set_num_threads(self.most)


adaptive_threads = ThreadControl().adaptive_threads
