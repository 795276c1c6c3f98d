"""Gradient storage protocol (single process, DDP, FSDP2, ZeRO)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from erasediff.parallel.world import World
from erasediff_kernels import Constraint


class Shard(NamedTuple):
    """One process's part of one trained parameter: elements ``start``, ``start`` + 1, ... of the flattened one.

    Attributes:
        name: Name of the parameter, without prefixes of DDP, an engine or torch.compile.
        start: Index of the first element.
        tensors: "weight", the fp32 master where there is one, and the optimizer's and averages' elements of it
            ("exp_avg", "exp_avg_sq", "ema", ...). Views into what is trained: writing to them is loading. Flat, or in
            the parameter's shape where the whole parameter is here and not contiguous: copy with ``view_as``.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


class GradientStore(Protocol):
    """Two backward passes per step, each taken as a list of tensors, and one update from both.

    The lists are this process's share: everything, or its shard. The solver sees only their Gram values.
    """

    world: World
    device: torch.device
    """The device that the model computes on."""
    optimizer: torch.optim.Optimizer
    """The user's own, inside of whatever wraps it."""
    max_grad_norm: float | None
    """Gradient clipping of an engine's own configuration; None where it says nothing."""
    accumulation_steps: int | None
    """Likewise."""

    @property
    def replicated(self) -> bool:
        """Whether every process holds every element."""
        ...

    @property
    def replicas(self) -> int:
        """Number of processes that hold each element, and so count it in their Gram values."""
        ...

    def no_reshard(self) -> AbstractContextManager[None]:
        """Within the block no weight changes: what one pass has gathered of cut ones may stay for the next.

        Gradients taken within are whole when it ends: their reduction may go on beside the next pass.
        """
        ...

    def autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        """``torch.autocast`` to ``dtype`` that holds in the model's forward passes, or nothing if it is None."""
        ...

    def begin(self, calls: int) -> None:
        """Begin a gradient that the next ``calls`` calls of ``backward`` make: only the last one need communicate.

        What a gradient has left that was begun and never popped, because a forward or backward pass raised, is dropped:
        the step can be tried again. Among several processes all must try again.

        Raises:
            RuntimeError: This process tries again and another did not fail, or failed elsewhere.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss``, averaged over the processes, to what the next ``pop_grads`` returns."""
        ...

    def pop_grads(self) -> list[Tensor]:
        """The gradient that ``begin`` began. The caller's to keep and to write to, until ``update``."""
        ...

    def release(self, gradients: list[Tensor]) -> None:
        """The caller needs what ``pop_grads`` has returned no more: the next gradients may be written there."""
        ...

    def gram(self, retain: list[Tensor], forget: list[Tensor]) -> Tensor:
        """float64 [3] = (|r|^2, <r, g>, |g|^2) of this process's elements that the update moves."""
        ...

    def update(self, retain: list[Tensor], forget: list[Tensor], constraint: Constraint) -> None:
        """One optimizer step along ``combine_``'s result; none at all where ``constraint.finite`` is false.

        What the lists hold afterwards is undefined, as after ``release``.
        """
        ...

    def set_masks(self, masks: list[Tensor]) -> None:
        """Freeze the elements whose entry in ``masks``, bool, one for each tensor of ``pop_grads``, is False.

        They have no part in the Gram values either. ``ValueError`` for an optimizer that takes no masks.
        """
        ...

    def weights(self) -> list[Tensor]:
        """This process's trained weights, fp32 masters where there are, one for each tensor of ``pop_grads``."""
        ...

    def refresh(self) -> None:
        """After ``weights`` or ``shards`` were written to: all that is derived from them, on every process."""
        ...

    def shards(self, **aligned: list[Tensor]) -> Iterator[Shard]:
        """This process's elements, and the same elements of lists that are ``aligned`` with ``weights``.

        The state of ``ConstrainedAdamW`` and ``ConstrainedSGD`` is whole before their first step, that of others after.
        """
        ...

    def scalars(self) -> dict[str, Tensor]:
        """The optimizer's 0-D state, the same on each process: counters of steps."""
        ...

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        """Restores ``scalars``."""
        ...


def combine_(retain: list[Tensor], forget: list[Tensor], constraint: Constraint) -> None:
    """Replace r by the direction of the update, in place: for optimizers that do not read both gradients themselves.

    Args:
        retain: r; afterwards clip_scale (r + multiplier g), or clip_scale (a r + b g) where the multiplier is (a, b).
        forget: g, or empty; its values are lost.
        constraint: of both, its tensors on any device.
    """
    multiplier, clip_scale = (value.to(retain[0].device) for value in (constraint.multiplier, constraint.clip_scale))
    if multiplier.dim() == 1:
        torch._foreach_mul_(retain, multiplier[0])
    if forget:
        torch._foreach_mul_(forget, multiplier if multiplier.dim() == 0 else multiplier[1])
        torch._foreach_add_(retain, forget)
    torch._foreach_mul_(retain, clip_scale)
