"""Everything ``erasediff plan`` shows of one model: counts, FLOPs, and memory for each way to spread it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from erasediff.models import lora
from erasediff.models.trainable import select, train_only
from erasediff.planning.memory import Layout, Precision, RankMemory, dtype_of, rank_memory
from erasediff.planning.reference_models import network_of
from erasediff.planning.trace import StepFlops, Trace, step_flops, trace

DEVICE_GB = (24, 40, 80, 141)
"""Sizes of GPUs, in 10^9 bytes: RTX 4090, A100, H100, H200."""
RESERVE_BYTES, RESERVE_SHARE = 1_500_000_000, 0.05
"""Of each GPU, what the driver's context and communication take, and what the allocator loses to fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``device_gb`` is the smallest of ``DEVICE_GB`` that the step fits; None where none does."""

    layout: Layout
    memory: RankMemory
    device_gb: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """``batch_size`` retained and as many forgotten samples per rank."""

    model: str
    train: str
    precision: Precision
    resolution: int
    batch_size: int
    gradient_checkpointing: bool
    parameters: int
    parameters_trained: int
    traced: Trace
    flops: StepFlops
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes end in ``_bytes``."""
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("rows", "traced", "flops")},
            "flops": {**asdict(self.flops), "total": self.flops.total},
            "activation_bytes": self.traced.activation_bytes,
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
    source: str,
    *,
    train: str = "xattn",
    lora_rank: int = 16,
    lora_targets: str = "xattn",
    ranks: Sequence[int] = (1, 8, 64),
    precision: Precision = "bfloat16",
    batch_size: int = 1,
    resolution: int | None = None,
    gradient_checkpointing: bool = False,
    relabel: bool = False,
    averages: bool = False,
    buckets: Layout | None = None,
) -> Overview:
    """Plan ``source`` (see ``network_of``); ``train`` is a selection of ``models.selection.select``, or "lora".

    ``relabel``, a forget target predicted by a frozen teacher, adds the teacher; ``averages`` a running average of the
    weights. ``buckets`` carries DeepSpeed's buffer sizes where they are not its defaults. UserError as ``network_of``
    and ``select``.
    """
    weights, autocast = dtype_of(precision)
    network = network_of(source, resolution, weights)
    if train == "lora":
        with torch.device("meta"):
            lora.add(network.module, rank=lora_rank, targets=select(network.module, lora_targets))
    else:
        train_only(network.module, select(network.module, train))
    traced = trace(network, batch_size=batch_size, autocast=autocast, gradient_checkpointing=gradient_checkpointing)
    parameters = list(network.module.parameters())
    rows = []
    for layout in layouts(ranks, buckets or Layout(stage=0)):
        memory = rank_memory(network, layout, traced, averages=averages, teacher=relabel)
        rows.append(Row(layout=layout, memory=memory, device_gb=smallest_device(memory.peak)))
    return Overview(
        model=network.name,
        train=train,
        precision=precision,
        resolution=network.resolution,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameters_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        traced=traced,
        flops=step_flops(traced, relabel=relabel),
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
    """The smallest of ``DEVICE_GB`` with room for ``peak`` bytes and the reserve."""
    return next((size for size in DEVICE_GB if peak + RESERVE_BYTES <= size * 1e9 * (1 - RESERVE_SHARE)), None)
