"""Plan of a step on one model: parameter counts, FLOPs, and memory for each parallel layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from erasediff.planning.memory import Layout, RankMemory, rank_memory
from erasediff.planning.reference_models import Network
from erasediff.planning.step_plan import StepPlan, dtypes
from erasediff.planning.trace import StepFlops, Trace, activation_bytes, step_flops, trace

DEVICE_GB = (24, 40, 80, 141)
"""Sizes of GPUs, in 10^9 bytes: RTX 4090, A100, H100, H200."""
RESERVE_BYTES, RESERVE_SHARE = 1_500_000_000, 0.05
"""Reserve of each GPU for the driver's context, communication, and the allocator's fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Memory of one layout.

    Attributes:
        layout: Launch mode, stage and number of ranks.
        memory: Bytes of each rank.
        device_gb: Smallest of ``DEVICE_GB`` that the step fits, in 10^9 bytes; None where none does.
    """

    layout: Layout
    memory: RankMemory
    device_gb: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """Plan of a step of one model, by layout.

    Attributes:
        model: Name of the model.
        resolution: Pixels along each side of an image.
        step: Passes and batch of the step.
        parameters: Parameters of the denoiser.
        parameters_trained: Parameters that are trained.
        traced: Activations of a traced pass.
        flops: FLOPs of the step.
        rows: Memory of each layout.
    """

    model: str
    resolution: int
    step: StepPlan
    parameters: int
    parameters_trained: int
    traced: Trace
    flops: StepFlops
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes end in ``_bytes``."""
        return {
            "model": self.model,
            "resolution": self.resolution,
            "parameters": self.parameters,
            "parameters_trained": self.parameters_trained,
            **asdict(self.step),
            "flops": {**asdict(self.flops), "total": self.flops.total},
            "activation_bytes": activation_bytes(self.traced, self.step),
            "reserved": {"bytes": RESERVE_BYTES, "share": RESERVE_SHARE},
            "rows": [
                {
                    "stage": row.layout.stage,
                    "ranks": row.layout.ranks,
                    "offload_optimizer": row.layout.offload_optimizer,
                    "offload_param": row.layout.offload_param,
                    "device_gb": row.device_gb,
                    **{f"{name}_bytes": value for name, value in asdict(row.memory).items()},
                    "host_bytes": row.memory.host,
                }
                for row in self.rows
            ],
        }


def overview(
    network: Network, step: StepPlan, *, ranks: Sequence[int] = (1, 8, 64), buckets: Layout | None = None
) -> Overview:
    """Plan ``step`` on ``network``.

    Args:
        network: Network on the meta device, in the dtype of ``step.precision``; trained parameters require gradients.
        step: The passes and the state of a step; ``workflows.plan`` derives them from a configuration.
        ranks: Numbers of processes to plan for.
        buckets: Layout with the buffer sizes, if they are not DeepSpeed's defaults.
    """
    traced = trace(
        network,
        batch_size=step.micro_batch_size,
        autocast=dtypes(step.precision)[1],
        gradient_checkpointing=step.gradient_checkpointing,
    )
    rows = []
    for layout in layouts(ranks, buckets or Layout(stage=0)):
        memory = rank_memory(network, layout, traced, step)
        rows.append(Row(layout=layout, memory=memory, device_gb=smallest_device(memory.peak)))
    parameters = list(network.module.parameters())
    return Overview(
        model=network.name,
        resolution=network.resolution,
        step=step,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameters_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        traced=traced,
        flops=step_flops(traced, step),
        rows=tuple(rows),
    )


def layouts(ranks: Sequence[int], buckets: Layout) -> Iterator[Layout]:
    """One process, then each stage and offload at each number of ranks."""
    for count in ranks:
        if count == 1:
            yield replace(buckets, stage=None, ranks=1)
        else:
            yield replace(buckets, stage=0, ranks=count)
        for stage in (1, 2, 3):
            yield replace(buckets, stage=stage, ranks=count)
        yield replace(buckets, stage=2, ranks=count, offload_optimizer=True)
        yield replace(buckets, stage=3, ranks=count, offload_optimizer=True, offload_param=True)


def smallest_device(peak: int) -> int | None:
    """Smallest of ``DEVICE_GB`` with room for ``peak`` bytes and the reserve."""
    return next((size for size in DEVICE_GB if peak + RESERVE_BYTES <= size * 1e9 * (1 - RESERVE_SHARE)), None)
