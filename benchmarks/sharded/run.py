"""Memory, communication and throughput under ZeRO stages 0-3: ``python benchmarks/sharded/run.py``.

Appends to results/sharded.jsonl and draws results/sharded.svg. ``--only memory`` (or volume, throughput) runs one part.
Each rank has one thread; there should be a core for each.
"""

from __future__ import annotations

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
    planned,
)

from erasediff.planning import Layout, rank_memory, trace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from record import append, environment

STAGES = (0, 1, 2, 3)
Line = dict[str, Any]


def memory(ranks: int, stages: Sequence[int]) -> Iterator[Line]:
    """The most that a rank takes during a step on the 100 M parameter model, and what ``erasediff plan`` says."""
    network = planned("100M")
    traced = trace(network, batch_size=1)
    for stage in stages:
        measured = run_ranks("memory", ranks, contender="erasediff", size="100M", stage=stage, per_rank=2)
        layout = Layout(
            stage=stage,  # type: ignore[arg-type]
            ranks=ranks,
            reduce_bucket_size=REDUCE_BUCKET_SIZE,
            stage3_prefetch_bucket_size=PREFETCH_BUCKET_SIZE,
            stage3_param_persistence_threshold=PERSISTENCE_THRESHOLD,
        )
        plan = rank_memory(network, layout, traced).peak
        peaks = [result["peak_bytes"] for result in measured]
        yield {
            "benchmark": "sharded memory",
            "stage": stage,
            "ranks": ranks,
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


def throughput(ranks: Sequence[int], stages: Sequence[int], per_rank: int, turns: int) -> Iterator[Line]:
    """Seconds per step on the same number of samples, in turns within the same processes."""
    for count in ranks:
        for stage in stages:
            results = run_ranks("throughput", count, size="15M", stage=stage, per_rank=per_rank, turns=turns)
            # A step ends when its last rank does.
            seconds = {
                name: [max(turn) for turn in zip(*(result["seconds"][name] for result in results), strict=True)]
                for name in results[0]["seconds"]
            }
            for name, taken in seconds.items():
                ratios = [mine / plain for mine, plain in zip(taken, seconds["deepspeed"], strict=True)]
                yield {
                    "benchmark": "sharded throughput",
                    "stage": stage,
                    "ranks": count,
                    "contender": name,
                    "samples": per_rank * count,
                    "seconds": statistics.median(taken),
                    "best_seconds": min(taken),
                    "samples_per_second": per_rank * count / statistics.median(taken),
                    "times_deepspeed": statistics.median(ratios),
                    "turns": turns,
                }


def main(
    only: Annotated[str | None, typer.Option(help="memory, volume or throughput.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes.")] = 2,
    stage: Annotated[list[int] | None, typer.Option(help="These stages alone.")] = None,
    samples: Annotated[int, typer.Option(help="Of each rank's step, for the throughput.")] = 32,
    turns: Annotated[int, typer.Option(help="Steps of each contender that count.")] = 5,
) -> None:
    stages = stage or STAGES
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "memory": lambda: memory(ranks, stages),
        "volume": lambda: volume(ranks, stages),
        "throughput": lambda: throughput(sorted({1, ranks}), stages, samples, turns),
    }
    for name in parts if only is None else [only]:
        began = time.perf_counter()
        for line in parts[name]():
            append("sharded", [environment("cpu") | {"threads": 1, "deepspeed": version("deepspeed")} | line])
            shown = {key: value for key, value in line.items() if key not in ("bytes", "calls", "benchmark")}
            print(name, shown, flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s")
    draw()


if __name__ == "__main__":
    typer.run(main)
