"""Roofline model of a step on many GPUs: FLOPs, bytes of memory, bytes on links.

Williams et al. 2009 for the roofline; rings within a node and between nodes for the collectives (Thakur et al. 2005).
It tells what bounds a step and how EraseDiff compares with fine-tuning; it is no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from erasediff.planning.memory import FP32
from erasediff.planning.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of H100 SXM GPUs. Rates per GPU and second; a share is what is reached of the rate.

    Attributes:
        gpus_per_node: Number of GPUs joined by NVLink.
        peak_flops: Dense bfloat16; ``flops_share`` is reached over forward and backward passes. The more of it, the
            less there is for the second gradient's reduction to hide behind.
        memory_bytes: HBM3.
        nvlink_bytes: Bytes per second each way, among the GPUs of a node.
        network_bytes: Bytes per second each way, InfiniBand NDR, one adapter of 400 Gb/s for each GPU.
        latency_seconds: Latency of each stage of an all-reduce of a few numbers between nodes.
        overlap: Share of the backward passes' time that can hide the gradients' reduction.
    """

    gpus_per_node: int = 8
    peak_flops: float = 989e12
    flops_share: float = 0.40
    memory_bytes: float = 3.35e12
    memory_share: float = 0.80
    nvlink_bytes: float = 450e9
    nvlink_share: float = 0.70
    network_bytes: float = 50e9
    network_share: float = 0.80
    latency_seconds: float = 15e-6
    overlap: float = 0.70


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledStep:
    """Seconds of one step under ZeRO 2 with bfloat16 weights and gradients, by cause.

    Attributes:
        ranks: Number of processes.
        samples: Samples of all ranks.
        compute: All passes.
        reduction: Reduce-scatters of gradients, of which ``exposed`` is not hidden behind backward passes.
        gather: All-gather of the updated weights.
        scalars: All-reduce of the Gram values.
        update: Gram values and the constrained update, on this rank's shard.
    """

    ranks: int
    samples: int
    compute: float
    reduction: float
    exposed: float
    gather: float
    scalars: float
    update: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.gather + self.scalars + self.update


def scaled_step(
    traced: Trace, trained: int, ranks: int, cluster: Cluster, *, gradients: int, samples_per_rank: int
) -> ScaledStep:
    """The step that reduces ``gradients`` gradients (EraseDiff two, fine-tuning one) of ``trained`` elements.

    ``samples_per_rank`` are all of a rank's samples, whose passes cost ``traced.pass_flops`` for ``traced.batch_size``.
    """
    half = 2
    flops = traced.pass_flops * samples_per_rank / traced.batch_size
    compute = flops / (cluster.peak_flops * cluster.flops_share)
    backward = compute * (1 - traced.forward_flops / traced.pass_flops)
    one_reduction = collective_seconds(half * trained, ranks, cluster)
    # Each gradient hides behind its own backward pass, which takes its share of the time.
    exposed = gradients * max(0.0, one_reduction - cluster.overlap * backward / gradients)
    # Per element: gradients read for the Gram values and again for the update; master and both moments read and
    # written; the low-precision weight written.
    moved = 2 * gradients * half + 6 * FP32 + half
    return ScaledStep(
        ranks=ranks,
        samples=samples_per_rank * ranks,
        compute=compute,
        reduction=gradients * one_reduction,
        exposed=exposed,
        gather=collective_seconds(half * trained, ranks, cluster),
        scalars=2 * ceil(log2(ranks)) * cluster.latency_seconds,
        update=moved * trained / ranks / (cluster.memory_bytes * cluster.memory_share),
    )


def collective_seconds(size: int, ranks: int, cluster: Cluster) -> float:
    """Seconds of a reduce-scatter or an all-gather of ``size`` bytes: rings within each node, then between nodes."""
    local = min(ranks, cluster.gpus_per_node)
    nodes = ceil(ranks / cluster.gpus_per_node)
    within = size * (local - 1) / local / (cluster.nvlink_bytes * cluster.nvlink_share)
    between = size / local * (nodes - 1) / nodes / (cluster.network_bytes * cluster.network_share)
    return within + between
