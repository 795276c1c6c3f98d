"""The optimizer's 0-D state, by names that no layout of the weights changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Counters:
    """Counters of steps: one for each group, wherever its parameters or their partitions keep it.

    members: (group, parameter or partition) of all that the optimizer updates
    """

    def __init__(self, optimizer: torch.optim.Optimizer, members: Iterable[tuple[int, Tensor]]) -> None:
        self.optimizer = optimizer
        self.members = list(members)

    def values(self) -> dict[str, Tensor]:
        """One tensor for each name; of those of one group, which are equal, the first."""
        return dict(reversed(list(self._all())))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Restores ``values`` everywhere."""
        for name, tensor in self._all():
            tensor.copy_(values[name])

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        for index, group in enumerate(self.optimizer.param_groups):
            if isinstance(group.get("step"), Tensor):
                yield f"group.{index}.step", group["step"]
        for index, member in self.members:
            state: dict[str, Any] = self.optimizer.state[member]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim == 0 and member.ndim != 0:
                    yield f"group.{index}.{key}", value
