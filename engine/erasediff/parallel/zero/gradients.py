"""ZeRO gradient store: gradients of a DeepSpeed engine, stages 0 to 3, with or without offloading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from erasediff.parallel.gradient_store import Shard, combine_
from erasediff.parallel.optimizer_state import Counters, masked_gram, set_masks
from erasediff.parallel.recovery import agree_to_retry
from erasediff.parallel.unwrap import named
from erasediff.parallel.world import World
from erasediff.parallel.zero.engine import (
    autocast,
    check_engine,
    engine_clipping,
    engine_clipping_disabled,
    reset_accumulation_boundary,
    reset_timers,
    set_global_grad_norm,
)
from erasediff.parallel.zero.layout import Layout
from erasediff.parallel.zero.stage0 import WholeMasters, WholeParameters
from erasediff.parallel.zero.stage1_2 import PartitionedGradients
from erasediff.parallel.zero.stage3 import PartitionedParameters
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, Constraint


def layout_of(engine: Any, *, own_reduction: bool = True) -> Layout:
    """The layout of an engine that ``check_engine`` has let pass. ``ValueError`` for an unknown optimizer wrapper."""
    wrapper = type(engine.optimizer).__name__
    if engine.optimizer is engine.basic_optimizer:
        return WholeParameters(engine, engine.basic_optimizer, own_reduction=own_reduction)
    if wrapper == "FP16_UnfusedOptimizer":
        return WholeMasters(engine, engine.optimizer, own_reduction=own_reduction)
    if wrapper == "DeepSpeedZeroOptimizer":
        return PartitionedGradients(engine.optimizer, own_reduction=own_reduction)
    if wrapper == "DeepSpeedZeroOptimizer_Stage3":
        return PartitionedParameters(engine.optimizer, own_reduction=own_reduction)
    if wrapper == "BF16_Optimizer":
        raise ValueError(
            "this DeepSpeed engine keeps gradients in its BF16_Optimizer: use ZeRO stage 2, or stage 1 without "
            '"data_types": {"grad_accum_dtype": "fp32"}'
        )
    raise ValueError(f"this DeepSpeed engine's optimizer is a {wrapper}, which is not known here")


class ZeroGradientStore:
    """``GradientStore`` of ``engine``, from ``deepspeed.initialize``: each process sees and updates its partition.

    ``engine.step()`` takes every step, so that its schedules and counters go on. With ``ConstrainedAdamW`` or
    ``ConstrainedSGD`` as the engine's client optimizer it reads both gradients in one pass; for any other the
    combination is formed in the retain gradient's own storage, and one flag is read on the host. The engine's
    ``gradient_clipping`` becomes ``max_grad_norm``, of the combination, and its ``gradient_accumulation_steps`` the
    number of micro-batches that a process cuts its batch into. Besides what the engine needs for itself there is one
    more gradient partition.

    Raises ``ValueError`` for engines that ``deepspeed.check_engine`` or ``deepspeed.layout_of`` do not know, and for
    bit masks that the optimizer had of whole parameters.
    """

    def __init__(self, engine: Any, *, own_reduction: bool = True) -> None:
        check_engine(engine)
        self.engine = engine
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer
        if any("mask" in state for state in self.optimizer.state.values()):
            raise ValueError("set_mask was called for parameters that the engine has cut: use gradients.set_masks")
        self.layout = layout_of(engine, own_reduction=own_reduction)
        self.counters = Counters(self.optimizer, zip(self.layout.groups, self.layout.flats, strict=True))
        self.world = World.current()
        self.device = torch.device(engine.device)
        self.max_grad_norm = engine_clipping(engine)
        self.accumulation_steps: int | None = engine.gradient_accumulation_steps()
        parameters = [fragment.parameter for fragment in self.layout.fragments()]
        self.names = dict(zip(parameters, named(engine, parameters), strict=True))
        self._is_partitioned = engine.zero_optimization()
        self._calls_left = 1
        self._is_open = False

    @property
    def replicated(self) -> bool:
        return self.replicas == self.world.size

    @property
    def replicas(self) -> int:
        return 1 if self._is_partitioned else self.world.size

    @contextmanager
    def no_reshard(self) -> Iterator[None]:
        # Before weights are gathered: recovering partitions them.
        self._recover()
        try:
            self.layout.keep_gathered(True)
            yield
        finally:
            self.layout.keep_gathered(False)

    def autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        return autocast(self.engine, self.device, dtype)

    def begin(self, calls: int) -> None:
        self._recover()
        self._is_open = True
        self._calls_left = calls
        self.layout.begin()
        self.engine.set_gradient_accumulation_boundary(calls == 1)

    def _recover(self) -> None:
        """Drop what a gradient that was begun and never popped has left, because a pass raised."""
        if not self._is_open:
            return
        agree_to_retry(self.world)
        self.layout.recover()
        reset_timers(self.engine)
        self._is_open = False

    def backward(self, loss: Tensor) -> None:
        with self.layout.reducing():
            self.engine.backward(loss, scale_wrt_gas=False)
        self._calls_left -= 1
        self.engine.set_gradient_accumulation_boundary(self._calls_left <= 1)

    def pop_grads(self) -> list[Tensor]:
        popped = self.layout.pop_grads()
        self._is_open = False
        return popped

    def release(self, gradients: list[Tensor]) -> None:
        self.layout.release(gradients)

    def gram(self, retain: list[Tensor], forget: list[Tensor]) -> Tensor:
        return masked_gram(self.optimizer, self.layout.flats, retain, forget)

    def set_masks(self, masks: list[Tensor]) -> None:
        flats = self.layout.flats
        set_masks(self.optimizer, [(flat, flat.detach()) for flat in flats], masks)

    def update(self, retain: list[Tensor], forget: list[Tensor], constraint: Constraint) -> None:
        if isinstance(self.optimizer, (ConstrainedAdamW, ConstrainedSGD)):
            self.layout.set_grads(retain)
            by_flat = dict(zip(self.layout.flats, forget, strict=True)) if forget else {}
            with self.optimizer.pending(by_flat, constraint), self._stepping():
                self.engine.step()
        elif bool(constraint.finite):
            combine_(retain, forget, constraint)
            self.layout.set_grads(retain)
            with self._stepping():
                self.engine.step()
        self.release(retain)
        self.release(forget)
        set_global_grad_norm(self.engine, constraint.norm)
        reset_accumulation_boundary(self.engine)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        with self.layout.stepping(), engine_clipping_disabled(self.engine):
            yield

    def weights(self) -> list[Tensor]:
        return [flat.detach() for flat in self.layout.flats]

    def refresh(self) -> None:
        self.layout.refresh()

    def shards(self, **aligned: list[Tensor]) -> Iterator[Shard]:
        self._initialize_state()
        flats = self.layout.flats
        for parameter, start, index, offset, length in self.layout.fragments():
            flat = flats[index]
            state = self.optimizer.state[flat].items()
            kept = {
                key: value
                for key, value in state
                if isinstance(value, Tensor) and value.shape == flat.shape and key != "mask"
            }
            others = {key: values[index] for key, values in aligned.items()}
            tensors = {"weight": flat.detach(), **kept, **others}
            cut = {
                key: value.view(-1).narrow(0, offset, length) if value.is_contiguous() else value
                for key, value in tensors.items()
            }
            yield Shard(self.names[parameter], start, cut)

    def scalars(self) -> dict[str, Tensor]:
        return self.counters.values()

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        self.counters.load(scalars)

    def _initialize_state(self) -> None:
        if not isinstance(self.optimizer, (ConstrainedAdamW, ConstrainedSGD)):
            return
        groups = self.optimizer.param_groups
        held = [group["params"] for group in groups]
        # ZeRO-3 puts a group's partitions there one by one, and only while it steps.
        for index, group in enumerate(groups):
            group["params"] = [
                flat for flat, owner in zip(self.layout.flats, self.layout.groups, strict=True) if owner == index
            ]
        self.optimizer.initialize_state()
        for group, params in zip(groups, held, strict=True):
            group["params"] = params
