"""Memory per rank of one step, item by item, for each ZeRO stage, offload and number of ranks.

What is stored follows from counting (Rajbhandari et al. 2020, arXiv 1910.02054, section 5, with a second gradient);
DeepSpeed's buffers follow its 0.19 sources. ``benchmarks/sharded`` compares both with what processes take.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erasediff.errors import UserError
from erasediff.parallel.zero.config import read_own
from erasediff.parallel.zero.reduce_scatter import LARGEST_BUCKET, MAX_OPEN_BUCKETS
from erasediff.parallel.zero.stage0 import BUCKET_NUMEL
from erasediff.planning.reference_models import Network
from erasediff.planning.step_plan import StepPlan
from erasediff.planning.trace import Trace, activation_bytes

FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Parallel layout of a run, with DeepSpeed's names and defaults.

    Attributes:
        stage: ZeRO stage; None for one process without DeepSpeed.
        ranks: Number of processes.
        offload_optimizer: Optimizer state on the CPU.
        offload_param: Parameters on the CPU, under ZeRO-3.
        reduce_bucket_size: Elements.
        overlap_comm: Overlap reductions with the backward pass.
        stage3_prefetch_bucket_size: Elements.
        stage3_param_persistence_threshold: Elements.
        stage3_max_reuse_distance: Elements.
        stage3_max_live_parameters: Elements.

    Raises:
        ValueError: The settings contradict each other.
    """

    stage: Literal[0, 1, 2, 3] | None = None
    ranks: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_max_live_parameters: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.ranks < 1 or (self.stage is None and self.ranks > 1):
            raise ValueError(f"{self.ranks} ranks do not fit stage {self.stage}")
        if self.offload_optimizer and not self.stage:
            raise ValueError("the optimizer can be offloaded under ZeRO stages 1, 2 and 3 only")
        if self.offload_param and self.stage != 3:
            raise ValueError("parameters can be offloaded under ZeRO stage 3 only")

    @property
    def label(self) -> str:
        if self.stage is None:
            return "one process"
        return f"ZeRO {self.stage}" + (", offload" if self.offload_optimizer else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Memory of one rank in bytes; entries with ``host_`` are on the CPU because they were offloaded.

    Attributes:
        weights, masters, moments, averages: Network and optimizer state.
        teacher: Frozen copy.
        gradients: All gradient lists (EraseDiff: retain and forget), as they are kept until the update.
        buffers: Buckets of gradients, and the parameters that ZeRO-3 gathers around the module that runs.
        activations: Peak within one pass; see ``trace.activation_bytes``.
        peak: Peak of the whole step; less than the sum, since gradients are allocated while activations are freed.
        method: State of the method itself per trained weight, such as an inner copy.
    """

    weights: int
    masters: int
    moments: int
    averages: int
    teacher: int
    gradients: int
    buffers: int
    activations: int
    peak: int
    method: int = 0
    host_weights: int = 0
    host_masters: int = 0
    host_moments: int = 0
    host_averages: int = 0
    host_method: int = 0
    host_gradients: int = 0
    host_buffers: int = 0

    @property
    def host(self) -> int:
        stored = self.host_weights + self.host_masters + self.host_moments + self.host_averages + self.host_method
        return stored + self.host_gradients + self.host_buffers


@dataclass(frozen=True, slots=True)
class Sizes:
    """Element counts of a network's weights, and bytes per element; ``trained_bytes`` is that of a trained one."""

    weights: int
    trained: int
    weight_bytes: int
    trained_bytes: int
    persistent: int
    largest_module: int


def sizes_of(network: Network, persistence_threshold: int) -> Sizes:
    """Count the weights of ``network`` exactly. ValueError if nothing is trained."""
    parameters = list(network.module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the network requires a gradient")
    modules = [sum(p.numel() for p in module.parameters(recurse=False)) for module in network.module.modules()]
    return Sizes(
        weights=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in trained),
        weight_bytes=parameters[0].element_size(),
        trained_bytes=trained[0].element_size(),
        persistent=sum(p.numel() for p in parameters if p.numel() <= persistence_threshold),
        largest_module=max(modules),
    )


def rank_memory(network: Network, layout: Layout, traced: Trace, plan: StepPlan | None = None) -> RankMemory:
    """Memory of each rank of ``layout`` during a step.

    Args:
        network: Network whose parameters have the dtypes and ``requires_grad`` of the run.
        layout: Sharding of the state over ranks.
        traced: Trace of a pass over ``plan.micro_batch_size`` samples.
        plan: Passes and state of the step; None for one gradient of retained and one of forgotten samples.
    """
    plan = plan or StepPlan()
    sizes = sizes_of(network, layout.stage3_param_persistence_threshold)
    half = sizes.trained_bytes < FP32
    # Weights that are not trained are the network's own, where nobody cuts them.
    frozen_teacher = sizes.trained * sizes.trained_bytes if plan.teacher else 0
    moments, average = plan.moment_bytes * sizes.trained, FP32 * sizes.trained if plan.averages else 0
    method = plan.state_bytes * sizes.trained
    activations = activation_bytes(traced, plan)
    gradient = sizes.trained * sizes.trained_bytes
    if not layout.stage:
        masters = FP32 * sizes.trained if layout.stage == 0 and half else 0
        # What was copied to a bucket is freed before the next one begins.
        bucket = min(BUCKET_NUMEL, sizes.trained) * sizes.trained_bytes if layout.ranks > 1 else 0
        # DeepSpeed casts one gradient to the masters' precision before it steps.
        cast = FP32 * sizes.trained if masters else 0
        stored = sizes.weights * sizes.weight_bytes + masters + moments + average + method + frozen_teacher
        in_pass = max(traced.pass_bytes, activations + (gradient if plan.accumulation_steps > 1 else 0))
        return RankMemory(
            weights=sizes.weights * sizes.weight_bytes,
            masters=masters,
            moments=moments,
            averages=average,
            teacher=frozen_teacher,
            gradients=plan.gradients * gradient,
            buffers=max(bucket, cast),
            activations=activations,
            method=method,
            # The other gradient is there already.
            peak=stored + (plan.gradients - 1) * gradient + max(in_pass, gradient + max(bucket, cast)),
        )
    shards = layout.ranks
    gradient = -(-gradient // shards)
    optimizer = {
        # ZeRO keeps an fp32 partition even of fp32 weights.
        "masters": -(-FP32 * sizes.trained // shards),
        "moments": -(-moments // shards),
        "averages": -(-average // shards),
        "method": -(-method // shards),
    }
    bucket = _reduction(layout, sizes) * sizes.trained_bytes
    gathered, weights = 0, sizes.weights * sizes.weight_bytes
    if layout.stage == 3:
        weights = -(-weights // shards)
        gathered = _gathered(layout, sizes) * sizes.weight_bytes
        frozen_teacher = weights if plan.teacher else 0
    on_device = {} if layout.offload_optimizer else optimizer
    on_host = optimizer if layout.offload_optimizer else {}
    gradients, host_gradients = plan.gradients * gradient, 0
    if layout.offload_optimizer:
        gradients, host_gradients = 0, plan.gradients * -(-FP32 * sizes.trained // shards)
    stored = sum(on_device.values()) + frozen_teacher + (0 if layout.offload_param else weights)
    in_pass = gradients + bucket + gathered + activations
    # Before the update, one gradient is cast to fp32.
    cast = FP32 * sizes.trained // shards if half else 0
    in_update = 0 if layout.offload_optimizer else plan.gradients * gradient + bucket + cast
    return RankMemory(
        weights=0 if layout.offload_param else weights,
        masters=on_device.get("masters", 0),
        moments=on_device.get("moments", 0),
        averages=on_device.get("averages", 0),
        teacher=frozen_teacher,
        gradients=gradients,
        buffers=bucket + gathered,
        activations=activations,
        peak=stored + max(in_pass, in_update),
        method=on_device.get("method", 0),
        host_weights=weights if layout.offload_param else 0,
        host_masters=on_host.get("masters", 0),
        host_moments=on_host.get("moments", 0),
        host_averages=on_host.get("averages", 0),
        host_method=on_host.get("method", 0),
        host_gradients=host_gradients,
        # A partition of the model's own precision: of the new weights on their way back, or under ZeRO-3 of a gradient.
        host_buffers=gradient if layout.offload_optimizer else 0,
    )


def _gathered(layout: Layout, sizes: Sizes) -> int:
    """Elements of weights that are gathered at a time under ZeRO-3."""
    if sizes.weights <= min(layout.stage3_max_reuse_distance, layout.stage3_max_live_parameters):
        return sizes.weights
    # What the backward pass needs again soon stays whole after the forward pass: there and back is twice the way.
    reused = layout.stage3_max_reuse_distance // 2
    at_once = sizes.persistent + sizes.largest_module + layout.stage3_prefetch_bucket_size + reused
    return min(sizes.weights, at_once)


def _reduction(layout: Layout, sizes: Sizes) -> int:
    """Elements in reduction buckets under ZeRO."""
    if layout.offload_optimizer:
        return layout.reduce_bucket_size * (2 if layout.overlap_comm and layout.stage != 3 else 1)
    ours = (
        min(MAX_OPEN_BUCKETS * min(layout.reduce_bucket_size, LARGEST_BUCKET), sizes.trained) if layout.ranks > 1 else 0
    )
    # ZeRO-3 allocates one bucket at the beginning, which then is ours.
    return max(ours, layout.reduce_bucket_size) if layout.stage == 3 else ours


def buckets_of(path: Path | None) -> Layout:
    """Read buffer sizes from a DeepSpeed configuration into a layout of stage 0.

    Args:
        path: DeepSpeed configuration; None for DeepSpeed's defaults, which also replace missing and "auto" sizes.

    Raises:
        UserError: The file cannot be read, or a size is not a whole number.
    """
    zero: dict[str, Any] = {} if path is None else read_own(path).get("zero_optimization", {})
    default = Layout(stage=0)

    def size(name: str) -> int:
        value = zero.get(name, getattr(default, name))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise UserError(f"{name} in {path} is {value!r}: it must be a whole number of elements.")
        return int(value)

    return Layout(
        stage=0,
        overlap_comm=zero.get("overlap_comm") is True,
        reduce_bucket_size=size("reduce_bucket_size"),
        stage3_prefetch_bucket_size=size("stage3_prefetch_bucket_size"),
        stage3_param_persistence_threshold=size("stage3_param_persistence_threshold"),
        stage3_max_reuse_distance=size("stage3_max_reuse_distance"),
        stage3_max_live_parameters=size("stage3_max_live_parameters"),
    )
