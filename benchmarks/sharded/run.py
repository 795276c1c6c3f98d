"""Memory, communication and throughput under ZeRO stages 0-3: ``python benchmarks/sharded/run.py``.

Appends to results/sharded.jsonl and draws results/sharded.svg. ``--only memory`` (or volume, throughput) runs one part.
Each rank has one thread; there should be a core for each.
"""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from draw import draw
from ranks import run_ranks
from workload import (
    PERSISTENCE_THRESHOLD,
    PREFETCH_BUCKET_SIZE,
    REDUCE_BUCKET_SIZE,
    SD,
    planned,
)

from erasediff.planning import Layout, rank_memory, trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from record import append, environment

STAGES = (0, 1, 2, 3)
Line = dict[str, Any]


def memory(ranks: int, stages: Sequence[int], *, bf16: bool, offload: str | None) -> Iterator[Line]:
    """The most that a rank takes during a step on the 100 M parameter model, and what ``erasediff plan`` says.

    What is offloaded goes from memory to memory here: the plan is that of device and host together.
    """
    network = planned("100M", bf16=bf16)
    traced = trace(network, batch_size=1)
    for stage in stages:
        options = {"size": "100M", "stage": stage, "per_rank": 2, "bf16": bf16, "offload": offload}
        measured = run_ranks("memory", ranks, bare=True, **options)
        layout = Layout(
            stage=stage,  # type: ignore[arg-type]
            ranks=ranks,
            offload_optimizer=offload is not None,
            offload_param=offload == "both",
            reduce_bucket_size=REDUCE_BUCKET_SIZE,
            stage3_prefetch_bucket_size=PREFETCH_BUCKET_SIZE,
            stage3_param_persistence_threshold=PERSISTENCE_THRESHOLD,
        )
        found = rank_memory(network, layout, traced)
        plan = found.peak + found.host
        if stage in (1, 2):
            # gloo gathers the new weights into memory of its own; both gradients are still there.
            stored = found.weights + found.masters + found.moments + found.gradients + found.buffers + found.host
            plan = max(plan, stored + found.weights)
        peaks = [result["peak_bytes"] for result in measured]
        yield {
            "benchmark": "sharded memory",
            "stage": stage,
            "ranks": ranks,
            "precision": "bfloat16" if bf16 else "float32",
            "offload": offload,
            "peak_bytes": peaks,
            "planned_bytes": plan,
            "measured_to_planned": statistics.mean(peaks) / plan,
        }


def volume(ranks: int, stages: Sequence[int]) -> Iterator[Line]:
    """Bytes handed to collectives in a step, of EraseDiff and of plain fine-tuning under the same stage."""
    gradient = 4 * sum(parameter.numel() for parameter in planned("15M").module.parameters())
    for stage in stages:
        counted = run_ranks("volume", ranks, size="15M", stage=stage, per_rank=4)[0]
        for contender, result in counted.items():
            yield {
                "benchmark": "sharded volume",
                "stage": stage,
                "ranks": ranks,
                "contender": contender,
                "gradient_bytes": gradient,
                "total_bytes": sum(result["bytes"].values()),
                **result,
            }


def throughput(
    ranks: Sequence[int], stages: Sequence[int], per_rank: int, turns: int, *, device: str, bf16: bool
) -> Iterator[Line]:
    """Seconds per step on the same number of samples, in turns within the same processes."""
    size = SD if device == "cuda" else "15M"
    for count in ranks:
        for stage in stages:
            options = {"size": size, "stage": stage, "per_rank": per_rank, "turns": turns, "bf16": bf16}
            results = run_ranks("throughput", count, device=device, **options)
            # A step ends when its last rank does; what others on this machine take from it is not in its CPU seconds.
            seconds, cpu_seconds = (
                {
                    name: list(map(reduce, zip(*(result[kind][name] for result in results), strict=True)))
                    for name in results[0][kind]
                }
                for kind, reduce in (("seconds", max), ("cpu_seconds", sum))
            )
            for name, taken in seconds.items():
                yield {
                    "benchmark": "sharded throughput",
                    "stage": stage,
                    "ranks": count,
                    "model": size,
                    "precision": "bfloat16" if bf16 else "float32",
                    "contender": name,
                    "samples": per_rank * count,
                    "seconds": statistics.median(taken),
                    "best_seconds": min(taken),
                    "samples_per_second": per_rank * count / statistics.median(taken),
                    "times_deepspeed": median_ratio(taken, seconds["deepspeed"]),
                    "cpu_seconds": statistics.median(cpu_seconds[name]),
                    "cpu_times_deepspeed": median_ratio(cpu_seconds[name], cpu_seconds["deepspeed"]),
                    "turns": turns,
                    "peak_bytes": [result["peak_bytes"].get(name) for result in results],
                }


def median_ratio(mine: Sequence[float], plain: Sequence[float]) -> float:
    """Of the turns, each beside its own neighbour."""
    return statistics.median(a / b for a, b in zip(mine, plain, strict=True))


def main(
    only: Annotated[str | None, typer.Option(help="memory, volume or throughput.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes.")] = 2,
    stage: Annotated[list[int] | None, typer.Option(help="These stages alone.")] = None,
    samples: Annotated[int, typer.Option(help="Of each rank's step, for the throughput.")] = 32,
    turns: Annotated[int, typer.Option(help="Steps of each contender that count.")] = 5,
    bf16: Annotated[bool, typer.Option("--bf16", help="Weights in bfloat16, for memory and throughput.")] = False,
    offload: Annotated[str | None, typer.Option(help="optimizer, or both it and parameters, for the memory.")] = None,
    device: Annotated[str, typer.Option(help="cuda: the throughput of Stable Diffusion 1.5's UNet on GPUs.")] = "cpu",
) -> None:
    # So that whoever stops it ends its ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stages = stage or STAGES
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "memory": lambda: memory(ranks, stages, bf16=bf16, offload=offload),
        "volume": lambda: volume(ranks, stages),
        "throughput": lambda: throughput(sorted({1, ranks}), stages, samples, turns, device=device, bf16=bf16),
    }
    if device == "cuda":
        only = "throughput"
    for name in parts if only is None else [only]:
        began = time.perf_counter()
        for line in parts[name]():
            append("sharded", [environment(device) | {"threads": 1, "deepspeed": version("deepspeed")} | line])
            shown = {key: value for key, value in line.items() if key not in ("bytes", "calls", "benchmark")}
            print(name, shown, flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s")
    draw()


if __name__ == "__main__":
    typer.run(main)
