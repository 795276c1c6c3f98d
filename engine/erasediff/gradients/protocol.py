"""What the solver needs of whoever owns the gradients."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from erasediff_kernels import Constraint


class Gradients(Protocol):
    """Two backward passes per step, each taken as a list of tensors, and one update from both.

    The lists are this process's share: everything, or its shard. The solver sees only their Gram values.
    """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss`` to what the next ``take`` returns."""
        ...

    def take(self) -> list[Tensor]:
        """The gradients accumulated since the last ``take``, one per trained parameter, without a copy."""
        ...

    def gram(self, retain: list[Tensor], forget: list[Tensor]) -> Tensor:
        """float64 [3] = (|r|^2, <r, g>, |g|^2) of the elements that the update moves, summed over all shards."""
        ...

    def update(self, retain: list[Tensor], forget: list[Tensor], constraint: Constraint) -> None:
        """One optimizer step along clip_scale (r + multiplier g); none at all where ``constraint.finite`` is false."""
        ...
