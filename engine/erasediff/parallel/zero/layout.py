"""How an engine keeps what its optimizer updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erasediff.parallel.zero.reduce_scatter import GradientScatter


class Fragment(NamedTuple):
    """``length`` elements of ``parameter`` from ``start`` on, which lie in ``flats[flat]`` from ``offset`` on."""

    parameter: nn.Parameter
    start: int
    flat: int
    offset: int
    length: int


class Layout(Protocol):
    """How an engine of one stage keeps gradients and weights."""

    flats: list[Tensor]
    groups: list[int]
    """Which of the optimizer's groups each flat belongs to."""

    def renew(self) -> None:
        """Room for a new gradient, where ``take`` handed out what the engine had."""
        ...

    def pop_grads(self) -> list[Tensor]: ...

    def set_grads(self, gradients: list[Tensor]) -> None:
        """What the engine's next step finds as its gradients."""
        ...

    def release(self, gradients: list[Tensor]) -> None:
        """Nobody needs what ``take`` has returned any more: the next gradient may be written there."""
        ...

    def keep_gathered(self, held: bool) -> None:
        """Whether weights that a pass has gathered stay for the next one, and what was taken may not be whole yet."""
        ...

    def fragments(self) -> Iterator[Fragment]: ...

    def refresh(self) -> None:
        """The model's weights from the flats."""
        ...


def unsupported_reduction(optimizer: Any) -> dict[str, bool]:
    """What either of ZeRO's optimizers may have been told of its gradients."""
    return {
        "scaled": optimizer.postscale_gradients and optimizer.gradient_predivide_factor != 1.0,
        "in several precisions": len(optimizer.ipg_buckets) != 1,
        "of sequences in parts": optimizer.sequence_parallel_size != 1,
        "of tensors in parts": optimizer.autoep_folding_tp_group is not None,
    }


def zeros_on_the_host(like: Tensor, *, pinned: bool) -> Tensor:
    return torch.zeros_like(like, requires_grad=False, pin_memory=pinned and torch.cuda.is_available())


class ReducerOverride:
    """``scatter`` in the place of the optimizer's own reduction, which copies each gradient two or three times more.

    add:   takes a parameter whose gradient is there, and what else DeepSpeed says of it
    names: of the optimizer's methods that do so
    """

    def __init__(self, optimizer: Any, scatter: GradientScatter, add: Callable[..., None], *names: str) -> None:
        self.optimizer = optimizer
        self.scatter = scatter
        self._instead: dict[str, Callable[..., None]] = dict.fromkeys(names, add)
        self._instead["independent_gradient_partition_epilogue"] = self._end_of_pass
        self._is_held = False

    def begin(self, flats: Sequence[Tensor]) -> None:
        self.scatter.begin(flats)
        vars(self.optimizer).update(self._instead)

    def finish(self) -> None:
        """The gradients are whole, or once they are no longer held. Whoever uses the engine then finds it as it was."""
        self.scatter.finish()
        if not self._is_held:
            self.scatter.wait()
        for name in self._instead:
            delattr(self.optimizer, name)

    def keep_gathered(self, held: bool) -> None:
        self._is_held = held
        if not held:
            self.scatter.wait()

    def _end_of_pass(self) -> None:
        self.optimizer._epilogue_ran_this_backward = True


def in_buckets(parameters: Iterable[Any], numel_of: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """In their order, of one dtype, and up to ``limit`` elements if it is more than one parameter."""
    together: list[Any] = []
    numel = 0
    for parameter in parameters:
        is_full = numel + numel_of(parameter) > limit
        if together and (is_full or parameter.dtype != together[0].dtype):
            yield together
            together, numel = [], 0
        together.append(parameter)
        numel += numel_of(parameter)
    if together:
        yield together
