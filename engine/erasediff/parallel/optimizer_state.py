"""Optimizer state by layout: update masks and step counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, gradient_gram, pack_mask


def set_masks(optimizer: torch.optim.Optimizer, members: Iterable[tuple[Tensor, Tensor]], masks: list[Tensor]) -> None:
    """Give each (tensor of the optimizer's groups, this process's elements of it) its mask, bool of their shape.

    ``ValueError`` for an optimizer other than ``ConstrainedAdamW`` and ``ConstrainedSGD``.
    """
    if not isinstance(optimizer, (ConstrainedAdamW, ConstrainedSGD)):
        raise ValueError(f"{type(optimizer).__name__} takes no masks: use ConstrainedAdamW or ConstrainedSGD")
    for (member, elements), mask in zip(members, masks, strict=True):
        # Bits are in the order of memory, which is that of the elements.
        aligned = torch.empty_like(elements, dtype=torch.bool, device=mask.device).copy_(mask)
        optimizer.set_mask(member, pack_mask(aligned))


def masked_gram(
    optimizer: torch.optim.Optimizer, members: Sequence[Tensor], retain: list[Tensor], forget: list[Tensor]
) -> Tensor:
    """float64 [3], the Gram values of the elements that are free to move; ``members`` are aligned with the lists."""
    masks = [optimizer.state[member].get("mask") for member in members]
    if all(mask is None for mask in masks):
        return gradient_gram(retain, forget)
    whole = [index for index, mask in enumerate(masks) if mask is None]
    masked = [index for index, mask in enumerate(masks) if mask is not None]
    values = torch.zeros(3, dtype=torch.float64, device=retain[0].device)
    for part in filter(None, (whole, masked)):
        r, g = ([gradients[index] for index in part] if gradients else [] for gradients in (retain, forget))
        values = values + gradient_gram(r, g, [masks[index] for index in part] if part is masked else ())
    return values


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
