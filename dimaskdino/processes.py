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
            dist.init_process_group("nccl" if cuda else "gloo")
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

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier()
