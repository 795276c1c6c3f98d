"""Draw results/sharded.svg from the last line of each case in results/sharded.jsonl, and from nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erasediff.report.figures import save_figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from record import RESULTS, read

ResultsFile = list[dict[str, Any]]


def draw() -> Path:
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in read(RESULTS / "sharded.jsonl"):
        # What was measured on CPUs, in fp32 and without offloading.
        plain = line.get("precision", "float32") == "float32" and line.get("offload") is None
        if plain and not line["device"].startswith("NVIDIA"):
            latest[line["benchmark"], line["ranks"], line["stage"], line.get("contender"), line.get("samples")] = line
    figure = Figure(figsize=(16, 3.6), layout="constrained")
    memory, volume, rate, scaling = figure.subplots(1, 4)

    def of(benchmark: str) -> ResultsFile:
        return sorted(
            (line for line in latest.values() if line["benchmark"] == f"sharded {benchmark}"),
            key=lambda line: (line["stage"], line["ranks"], line.get("samples", 0)),
        )

    bars(memory, of("memory"), {"measured": lambda m: max(m["peak_bytes"]), "planned": lambda m: m["planned_bytes"]})
    memory.set(title="peak memory per rank, 100 M parameters, 2 ranks", ylabel="GiB", ylim=(0, 2.4))
    grouped(volume, of("volume"), lambda line: line["total_bytes"] / line["gradient_bytes"])
    volume.set(title="bytes handed to collectives per step", ylabel="times one gradient")
    both = []
    for line in of("throughput"):
        alone = latest.get((line["benchmark"], 1, line["stage"], line["contender"], 32))
        if (line["ranks"], line["samples"]) == (2, 64) and alone and alone["device"] == line["device"]:
            both.append(line | {"scaling": line["samples_per_second"] / alone["samples_per_second"]})
    grouped(scaling, both, lambda line: line["scaling"])
    scaling.axhline(2, linestyle="--", color="black", label="in proportion")
    scaling.set(title="2 ranks of 32 samples on 2 cores", ylabel="times one rank's samples per second", ylim=(0, 3.2))
    times = [line for line in of("throughput") if line["contender"] == "erasediff"]
    for line in times:
        each = line["samples"] // line["ranks"]
        line["contender"] = f"{line['ranks']} rank{'s' * (line['ranks'] > 1)} of {each} samples"
    grouped(rate, times, lambda line: line["times_deepspeed"])
    rate.axhline(1.10, linestyle="--", color="black", label="1.10")
    rate.set(title="erasediff's time per step", ylabel="times DeepSpeed fine-tuning's", ylim=(0, 1.7))
    for axes in (memory, volume, rate, scaling):
        axes.set_xlabel("ZeRO stage")
        axes.title.set_fontsize(9)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="upper right" if axes is memory else "upper left")
    path = RESULTS / "sharded.svg"
    save_figure(figure, path)
    return path


def bars(axes: Axes, lines: ResultsFile, values: dict[str, Any]) -> None:
    for offset, (name, value) in zip((-0.2, 0.2), values.items(), strict=True):
        axes.bar([line["stage"] + offset for line in lines], [value(line) / 2**30 for line in lines], 0.38, label=name)
    axes.set_xticks([line["stage"] for line in lines])


def grouped(axes: Axes, lines: ResultsFile, value: Any) -> None:
    names = sorted({line["contender"] for line in lines})
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        mine = [line for line in lines if line["contender"] == name]
        places = [line["stage"] + (index - (len(names) - 1) / 2) * width for line in mine]
        axes.bar(places, [value(line) for line in mine], width * 0.95, label=name)
    axes.set_xticks(sorted({line["stage"] for line in lines}))


if __name__ == "__main__":
    print(draw())
