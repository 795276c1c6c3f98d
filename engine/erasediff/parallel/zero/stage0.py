"""ZeRO 0: replicated parameters, with gradients averaged over all processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from erasediff.parallel.zero.engine import patched
from erasediff.parallel.zero.layout import Fragment, in_buckets

BUCKET_NUMEL = 1 << 22
"""Elements beyond which an all-reduce is no faster."""
ALIGNMENT = 32
"""Elements: kernels read 16 bytes at a time of what begins at a multiple of 16 bytes."""


class WholeParameters:
    """Stage 0 in fp32: gradients of whole parameters in ``grad``, averaged over all processes.

    DeepSpeed copies all of them into one tensor for that, and back. Here they are copied once, to buckets: from then on
    each ``grad`` is a view of one, and what it was is freed before the next is copied.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, *, own_reduction: bool = True) -> None:
        chosen = [
            (parameter, index)
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        self.parameters = [parameter for parameter, _ in chosen]
        self.groups = [index for _, index in chosen]
        self.flats: list[Tensor] = list(self.parameters)
        self._is_held = False
        self._under_way: list[Callable[[], object]] = []
        self._engine = engine
        self._is_own = own_reduction and bool(engine.gradient_average)
        self._sent_as: torch.dtype = engine.communication_data_type

    @torch.no_grad()
    def _average(self, grads: None = None, elements_per_buffer: int = 0) -> None:
        processes = torch.distributed.get_world_size()
        if processes == 1:
            return
        for parameters in in_buckets(self.parameters, _aligned, BUCKET_NUMEL):
            numel = sum(_aligned(parameter) for parameter in parameters)
            buffer = torch.empty(numel, dtype=parameters[0].dtype, device=parameters[0].device)
            offset = 0
            for parameter in parameters:
                room = buffer.as_strided(parameter.shape, parameter.stride(), offset)
                if parameter.grad is None:
                    room.zero_()
                else:
                    torch.div(parameter.grad, processes, out=room)
                parameter.grad = room
                offset += _aligned(parameter)
            sent = buffer.to(self._sent_as)
            work = torch.distributed.all_reduce(sent, async_op=True)
            self._under_way.append(functools.partial(_settle, work, sent, buffer))
        if not self._is_held:
            self._wait()

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, []
        for settle in under_way:
            settle()

    def begin(self) -> None:
        for parameter in (*self.parameters, *self.flats):
            parameter.grad = None

    def reducing(self) -> AbstractContextManager[None]:
        return patched(self._engine, buffered_allreduce_fallback=self._average) if self._is_own else nullcontext()

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recover(self) -> None:
        self._wait()

    def pop_grads(self) -> list[Tensor]:
        for parameter in self.parameters:
            if parameter.grad is None:
                # No loss has reached it.
                parameter.grad = torch.zeros_like(parameter)
        taken: list[Tensor] = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def set_grads(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def release(self, gradients: list[Tensor]) -> None:
        pass

    def keep_gathered(self, held: bool) -> None:
        self._is_held = held
        if not held:
            self._wait()

    def fragments(self) -> Iterator[Fragment]:
        for index, parameter in enumerate(self.parameters):
            yield Fragment(parameter, 0, index, 0, parameter.numel())

    def refresh(self) -> None:
        pass


class WholeMasters(WholeParameters):
    """Stage 0 in bf16: as there, with an fp32 master of each parameter in the optimizer's groups."""

    def __init__(self, engine: Any, optimizer: Any, *, own_reduction: bool = True) -> None:
        super().__init__(engine, optimizer.optimizer, own_reduction=own_reduction)
        self.parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        assert len(self.parameters) == len(self.flats)

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, master in zip(self.parameters, self.flats, strict=True):
            parameter.copy_(master)


def _aligned(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def _settle(work: torch.distributed.Work, sent: Tensor, buffer: Tensor) -> None:
    work.wait()
    if sent is not buffer:
        buffer.copy_(sent)
