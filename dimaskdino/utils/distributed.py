"""Distributed training and evaluation: rank, device and collective operations of this process."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
STORE = "DIMASKDINO_STORE"  # environment variable: file of the store of processes on one machine


@dataclass(frozen=True)
class DistributedContext:
    """Rank and device of this process, from the environment variables that torchrun sets.

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
        """Join torchrun's process group, if there is one, and leave it at the end."""
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
        """Sum each value over all processes. The result stays on the device, so that the host does not wait."""
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
        """Return the values of all processes, by rank. Values are pickled, so keep them small."""
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

    The store still holds the addresses of the processes before a restart, and Gloo may read those: with torch 2.15
    every second restart failed to connect. A prefix per restart keeps them apart.
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
