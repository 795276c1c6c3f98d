"""World: rank, size and device of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class World:
    """Rank and size of torch's default process group; one process by default.

    Attributes:
        rank: Rank among all processes.
        size: Number of all processes.
        local_rank: Rank among the processes of this machine.
        device: Device that this process computes on.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @classmethod
    def current(cls) -> World:
        """The world that ``torch.distributed`` was initialised with; a world of one where it was not."""
        has_group = dist.is_available() and dist.is_initialized()
        local_rank = int(os.environ.get("LOCAL_RANK", 0)) if has_group else 0
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else CPU
        if not has_group:
            return cls(device=device)
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes what belongs to all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; one all-reduce, none in a world of one."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, the same bits on each."""
        return self.sum(values) / self.size if self.size > 1 else values

    def barrier(self) -> None:
        """Wait for all processes. A collective: it is subject to the process group's time limit."""
        if self.size > 1:
            dist.barrier()
