"""Gradient and weight layout of a DeepSpeed engine: the protocol, and what ZeRO 1 to 3 have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from erasediff.parallel.zero.engine import patched
from erasediff.parallel.zero.reduce_scatter import GradientScatter


class Fragment(NamedTuple):
    """``length`` elements of ``parameter`` from ``start`` on, which lie in ``flats[flat]`` from ``offset`` on."""

    parameter: nn.Parameter
    start: int
    flat: int
    offset: int
    length: int


class Layout(Protocol):
    """Storage of gradients and weights in an engine of one stage."""

    flats: list[Tensor]
    groups: list[int]
    """Index of the optimizer's group of each flat."""

    def begin(self) -> None:
        """Provide storage for a new gradient, where ``pop_grads`` handed out what the engine had."""
        ...

    def reducing(self) -> AbstractContextManager[None]:
        """Within the block a backward pass reduces gradients; outside, the engine's functions are its own."""
        ...

    def stepping(self) -> AbstractContextManager[None]:
        """Within the block the engine's step neither computes a gradient norm nor waits for one."""
        ...

    def recover(self) -> None:
        """Drop what a pass that raised has left: open buckets, partial gradients, gathered weights."""
        ...

    def pop_grads(self) -> list[Tensor]: ...

    def set_grads(self, gradients: list[Tensor]) -> None:
        """Make ``gradients`` what the engine's next step finds as its own."""
        ...

    def release(self, gradients: list[Tensor]) -> None:
        """Take back what ``pop_grads`` returned: the next gradient may be written there."""
        ...

    def keep_gathered(self, held: bool) -> None:
        """Whether weights that a pass gathered stay for the next, and a popped gradient's reduction may go on."""
        ...

    def fragments(self) -> Iterator[Fragment]: ...

    def refresh(self) -> None:
        """Write the flats to the model's weights."""
        ...


def unsupported_reduction(optimizer: Any) -> dict[str, bool]:
    """Settings of either of ZeRO's optimizers under which a reduction is more than a mean in one precision."""
    return {
        "scaled": optimizer.postscale_gradients and optimizer.gradient_predivide_factor != 1.0,
        "in several precisions": len(optimizer.ipg_buckets) != 1,
        "of sequences in parts": optimizer.sequence_parallel_size != 1,
        "of tensors in parts": optimizer.autoep_folding_tp_group is not None,
    }


class ReducerOverride:
    """``scatter`` in the place of the optimizer's own reduction, which copies each gradient two or three times more.

    Args:
        optimizer: The engine's ZeRO optimizer.
        scatter: Reduces gradients, each as it comes in.
        add: Takes a parameter whose gradient is there, and what else DeepSpeed passes with it.
        names: The optimizer's methods in whose place ``add`` is called.
    """

    def __init__(self, optimizer: Any, scatter: GradientScatter, add: Callable[..., None], *names: str) -> None:
        self.optimizer = optimizer
        self.scatter = scatter
        self._methods: dict[str, Callable[..., None]] = dict.fromkeys(names, add)
        self._methods["independent_gradient_partition_epilogue"] = self._end_of_pass
        self._is_held = False

    def begin(self, flats: Sequence[Tensor]) -> None:
        self.scatter.begin(flats)

    def installed(self) -> AbstractContextManager[None]:
        """Within the block the optimizer's hooks call this reduction."""
        return patched(self.optimizer, **self._methods)

    def finish(self) -> None:
        """Complete the gradients, or let their reduction go on until they are no longer held."""
        self.scatter.finish()
        if not self._is_held:
            self.scatter.wait()

    def keep_gathered(self, held: bool) -> None:
        self._is_held = held
        if not held:
            self.scatter.wait()

    def _end_of_pass(self) -> None:
        self.optimizer._epilogue_ran_this_backward = True


class PartitionedLayout(ABC):
    """ZeRO 1 to 3: fp32 partitions, whose gradients come from our reduction, from DeepSpeed's, or from the CPU.

    Attributes:
        optimizer: The engine's ZeRO optimizer.
        flats: This process's fp32 partitions.
        is_offloaded: Whether the optimizer is on the CPU; gradients are then in the flats' ``grad`` after a pass.
        pins_memory: Whether that memory is pinned.
    """

    def __init__(self, optimizer: Any, flats: Iterable[Tensor], *, is_offloaded: bool, pins_memory: bool) -> None:
        self.optimizer = optimizer
        self.flats = list(flats)
        self.is_offloaded = is_offloaded
        self.pins_memory = pins_memory and torch.cuda.is_available()
        self.reduction: ReducerOverride | None = None

    def begin(self) -> None:
        self._reset_micro_steps()
        self.optimizer.zero_grad()
        if self.is_offloaded:
            for flat in self.flats:
                if flat.grad is None:
                    flat.grad = torch.zeros_like(flat, requires_grad=False, pin_memory=self.pins_memory)
            return
        storage = self._begin_gradient()
        if self.reduction is not None:
            self.reduction.begin(storage)

    def reducing(self) -> AbstractContextManager[None]:
        return nullcontext() if self.reduction is None else self.reduction.installed()

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recover(self) -> None:
        optimizer = self.optimizer
        if self.reduction is not None:
            self.reduction.scatter.abort()
        for bucket in optimizer.ipg_buckets.values():
            self._clear_bucket(bucket)
        reduced = optimizer.params_already_reduced
        for key in reduced if isinstance(reduced, dict) else range(len(reduced)):
            reduced[key] = False
        optimizer._backward_active_depth = 0
        optimizer.clear_backward_seen_flag()
        for flat in self.flats:
            flat.grad = None

    def pop_grads(self) -> list[Tensor]:
        if self.is_offloaded:
            self._wait_for_offload()
            popped: list[Tensor] = [flat.grad for flat in self.flats]  # type: ignore[misc]
            for flat in self.flats:
                flat.grad = None
            return popped
        if self.reduction is not None:
            self._add_rest()
            self.reduction.finish()
        return self._popped()

    def set_grads(self, gradients: list[Tensor]) -> None:
        for index, gradient in enumerate(gradients):
            if self.is_offloaded:
                self.flats[index].grad = gradient
            else:
                self.optimizer.averaged_gradients[index] = [gradient]

    def keep_gathered(self, held: bool) -> None:
        if self.reduction is not None:
            self.reduction.keep_gathered(held)

    def _reset_micro_steps(self) -> None:  # noqa: B027
        """Make the next backward pass overwrite what further ones add to, as the optimizer's ``zero_grad`` may."""

    @abstractmethod
    def _begin_gradient(self) -> list[Tensor]:
        """Storage of a new gradient, flat, one tensor for each that our reduction writes to."""

    @abstractmethod
    def _clear_bucket(self, bucket: Any) -> None:
        """Empty one of the optimizer's own buckets."""

    @abstractmethod
    def _popped(self) -> list[Tensor]:
        """The gradients of the flats, once they are reduced."""

    def _add_rest(self) -> None:  # noqa: B027
        """Hand our reduction the gradients that no hook has."""

    def _wait_for_offload(self) -> None:  # noqa: B027
        """Wait for copies of gradients to the CPU."""


def in_buckets(parameters: Iterable[Any], numel_of: Callable[[Any], int], limit: int) -> Iterator[list[Any]]:
    """Cut ``parameters``, in their order, into lists of one dtype and at most ``limit`` elements, or one parameter."""
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
