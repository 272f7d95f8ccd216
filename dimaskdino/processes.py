"""Several processes that work on one thing together."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's place among the others, as torchrun says it."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator["Processes"]:
        """Join the process group that torchrun announces, if any, and leave it at the end."""
        world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if world > 1:
            _init_process_group("nccl" if cuda else "gloo", world)
        try:
            yield cls(int(os.environ.get("RANK", 0)), world, device)
        finally:
            if world > 1:
                dist.destroy_process_group()

    def sum(self, *values: float) -> Tensor:
        """The sum of each number over all processes, left on the device so that nothing waits for it."""
        tensor = torch.tensor(values, dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        values = values.clone()
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()


def _init_process_group(backend: str, world: int) -> None:
    """As torch does it, but safe when torchrun starts the processes again.

    Its store keeps the addresses of the processes before, and Gloo may read those (seen with torch 2.15: every second
    restart failed to connect); under a name of its own each generation sees only its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"dimaskdino {generation}", store)
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=world)
