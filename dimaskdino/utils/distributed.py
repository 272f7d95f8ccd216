"""Distributed training and evaluation: this process's place among the others, and sums over all of them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
STORE = "DIMASKDINO_STORE"  # a file through which the processes of one machine meet


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank among `world_size` processes, and its device, as torchrun announces them.

    Attributes:
        rank: from 0 to `world_size` - 1.
        world_size: number of processes; 1 without torchrun.
        device: `cuda:LOCAL_RANK` if there is a GPU, else the CPU.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def join(cls) -> Iterator["DistributedContext"]:
        """Join the process group that torchrun announces, if any, and leave it at the end."""
        world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world_size > 1:
            _init_process_group("nccl" if cuda else "gloo", world_size)
        try:
            yield cls(int(os.environ.get("RANK", 0)), world_size, device)
        finally:
            if world_size > 1:
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the process that prints and writes files."""
        return self.rank == 0

    def sum(self, *values: float) -> Tensor:
        """Sum each value over all processes; the result stays on the device, so nothing waits for it."""
        tensor = torch.tensor(values, dtype=torch.float32).to(self.device, non_blocking=True)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes."""
        values = values.clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; values are pickled, so keep them small."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has reached this point."""
        if self.world_size > 1:
            dist.barrier()


def _init_process_group(backend: str, world_size: int) -> None:
    """Initialise the process group so that it survives restarts by torchrun.

    The store keeps the addresses of the processes before a restart, and Gloo may read those (with torch 2.15 every
    second restart failed to connect). A prefix per restart keeps the generations apart.
    """
    store: dist.Store
    if STORE in os.environ:
        store = dist.FileStore(os.environ[STORE], world_size)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    else:
        dist.init_process_group(backend)
        return
    store = dist.PrefixStore(f"dimaskdino {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=world_size)
