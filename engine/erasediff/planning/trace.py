"""FLOPs and peak memory of a forward and backward pass, counted on fake tensors without weights or arithmetic."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from erasediff.planning.reference_models import Network
from erasediff.planning.step_plan import StepPlan

aten = torch.ops.aten

MARGIN = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Cost of one pass over ``batch_size`` samples. FLOPs count a multiplication and its addition as two.

    Attributes:
        batch_size: Samples in the pass.
        forward_flops: FLOPs of a forward pass without gradients.
        pass_flops: FLOPs of forward and backward, with checkpointing's second forward where it is on.
        forward_bytes: Peak of a forward pass without gradients, beyond parameters.
        saved_bytes: Bytes kept between forward and backward.
        activation_bytes: Peak of forward and backward beyond parameters and their gradients: what is saved for the
            backward pass, and temporaries.
        pass_bytes: The same with the parameters' gradients as they come to be.
    """

    batch_size: int
    forward_flops: int
    pass_flops: int
    forward_bytes: int
    saved_bytes: int
    activation_bytes: int
    pass_bytes: int


def trace(
    network: Network, *, batch_size: int, autocast: torch.dtype | None = None, gradient_checkpointing: bool = False
) -> Trace:
    """Run ``network`` on fake tensors; its parameters' dtypes and ``requires_grad`` say how, and what is trained.

    Attention is counted as one fused operator that saves its inputs, output and row sums, as flash attention does.
    What an allocator loses to rounding and fragmentation is not counted.

    Args:
        network: Network on any device; its weights are not read.
        batch_size: Samples in the pass.
        autocast: Dtype of the operators under autocast; None for the weights' own.
        gradient_checkpointing: As diffusers does it: each block keeps its input and runs again.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        module: Any = _fake_module(network.module)
        module.train()
        if gradient_checkpointing:
            module.enable_gradient_checkpointing()
        inputs = network.inputs(batch_size, network.dtype, "cpu")
        precision = partial(torch.autocast, "cpu", autocast) if autocast is not None else nullcontext
        with torch.no_grad(), precision(), flop_counter() as forward, LiveBytes() as idle:
            module(**inputs)
        with flop_counter() as both, LiveBytes() as live:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(live.note_gradient)
            with precision():
                (prediction,) = module(**inputs)
            loss = prediction.float().square().mean()
            del prediction
            saved = live.alive
            live.begin_backward()
            loss.backward()
    return Trace(
        batch_size=batch_size,
        forward_flops=forward.get_total_flops(),
        pass_flops=both.get_total_flops(),
        forward_bytes=idle.peak,
        saved_bytes=saved,
        activation_bytes=live.peak,
        pass_bytes=live.peak_with_gradients,
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators made and that are still alive, gradients of parameters told apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.peak_with_gradients = 0
        self._sizes: dict[int, int] = {}
        self.alive = self._gradients = 0
        self._collect_at = self._collect_all_at = sys.maxsize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # A view or an in-place result shares an input's storage, which may be a parameter's.
            if isinstance(leaf, Tensor) and id_of(leaf) not in inputs and id_of(leaf) not in self._sizes:
                self._add(leaf)
        self._note_peaks()
        return result

    def _note_peaks(self) -> None:
        if self.alive - self._gradients > self._collect_at or self.alive > self._collect_all_at:
            # Checkpointing leaves reference cycles, whose fake tensors would be taken for live ones. The margin keeps
            # collections rare, and garbage below it.
            gc.collect()
            self._collect_at = max(self._collect_at, int(MARGIN * (self.alive - self._gradients)))
            self._collect_all_at = max(self._collect_all_at, int(MARGIN * self.alive))
        self.peak = max(self.peak, self.alive - self._gradients)
        self.peak_with_gradients = max(self.peak_with_gradients, self.alive)

    def __enter__(self) -> Self:
        gc.collect()
        gc.freeze()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        gc.unfreeze()

    def begin_backward(self) -> None:
        """Start collecting garbage whenever the live bytes approach a peak, for the backward pass."""
        self._collect_at, self._collect_all_at = int(MARGIN * self.peak), int(MARGIN * self.peak_with_gradients)

    def note_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of ``parameter``, which is complete, as one from now on."""
        if parameter.grad is not None:
            self._gradients += parameter.grad.untyped_storage().nbytes()

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id_of(tensor)
        self._sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.alive -= self._sizes.pop(key, 0)


def id_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _fake_module(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are fake tensors on the CPU, whatever device the module is on."""
    with unset_fake_temporarily():
        copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return copied


def flop_counter() -> FlopCounterMode:
    """Counts attention on a CPU too, as one fused operator."""

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    def attention_backward(
        grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """FLOPs of one step's network passes, a multiplication and its addition counted as two.

    The update adds about 30 per trained weight, which is below a thousandth of a pass over one sample.

    Attributes:
        retain: Passes with gradients on retained samples.
        forget: Passes with gradients on forgotten samples, an inner solve's included.
        teacher: Forward passes of the frozen copy.
        no_grad: Forward passes of the model without gradients.
        fine_tuning: Plain fine-tuning on as many samples.
    """

    retain: int
    forget: int
    teacher: int
    no_grad: int
    fine_tuning: int

    @property
    def total(self) -> int:
        return self.retain + self.forget + self.teacher + self.no_grad


def step_flops(traced: Trace, plan: StepPlan) -> StepFlops:
    """FLOPs of the passes of ``plan``, each in proportion to its number of samples."""

    def of(flops: int, samples: float) -> int:
        return round(flops * samples / traced.batch_size)

    return StepFlops(
        retain=of(traced.pass_flops, plan.samples(gradient=True, data="retain")),
        forget=of(traced.pass_flops, plan.samples(gradient=True, data="forget")),
        teacher=of(traced.forward_flops, plan.samples(network="teacher")),
        no_grad=of(traced.forward_flops, plan.samples(network="model", gradient=False)),
        fine_tuning=of(traced.pass_flops, plan.data_samples),
    )


def activation_bytes(traced: Trace, plan: StepPlan) -> int:
    """Peak of activations in a step: of a pass with gradients, or of a forward pass beside what another one saved."""
    per_row = traced.forward_bytes / traced.batch_size
    peaks = [per_row * plan.rows(nested=False)]
    if any(part.gradient for part in plan.passes):
        peaks.append(traced.activation_bytes)
    if plan.rows(nested=True):
        peaks.append(traced.saved_bytes + per_row * plan.rows(nested=True))
    return round(max(peaks))
