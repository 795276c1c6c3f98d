"""Model SDXL's full unlearning on 8 to 512 GPUs beside fine-tuning: ``python benchmarks/sharded/scaling.py``.

Replaces results/scaling.jsonl, then draws results/scaling.svg from it. No measurement: every assumption is in each line
and under the plot.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from erasediff.planning import network_of, trace
from erasediff.planning.scaling import Cluster, scaled_step
from erasediff.report.figures import save_figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from record import RESULTS, commit, read

RANKS = (8, 16, 32, 64, 128, 256, 512)
SAMPLES_PER_RANK = 8
GRADIENTS = {"erasediff": 2, "fine-tuning": 1}


def lines() -> list[dict[str, Any]]:
    network = network_of("sdxl", dtype=torch.bfloat16)
    trained = sum(parameter.numel() for parameter in network.module.parameters())
    traced = trace(network, batch_size=1, gradient_checkpointing=True)
    cluster = Cluster()
    found = []
    for name, gradients in GRADIENTS.items():
        for ranks in RANKS:
            step = scaled_step(traced, trained, ranks, cluster, gradients=gradients, samples_per_rank=SAMPLES_PER_RANK)
            found.append(
                {
                    "benchmark": "scaling model",
                    "commit": commit(),
                    "torch": torch.__version__,
                    "model": "sdxl, 1024 pixels, all weights, bfloat16, gradient checkpointing, ZeRO 2",
                    "contender": name,
                    "seconds": step.seconds,
                    "samples_per_second": step.samples / step.seconds,
                    **asdict(step),
                    "assumptions": {
                        "samples_per_rank": SAMPLES_PER_RANK,
                        "flops_per_sample": traced.pass_flops,
                        "trained": trained,
                        **asdict(cluster),
                    },
                }
            )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    rate, parts = figure.subplots(1, 2)
    for name in GRADIENTS:
        mine = [line for line in found if line["contender"] == name]
        rate.loglog([m["ranks"] for m in mine], [m["samples_per_second"] for m in mine], marker="o", label=name)
    first = next(line for line in found if line["contender"] == "fine-tuning")
    ideal = [first["samples_per_second"] * ranks / first["ranks"] for ranks in RANKS]
    rate.loglog(RANKS, ideal, linestyle=":", color="grey", label="in proportion to 8 GPUs")
    rate.set(title=first["model"], xlabel="GPUs", ylabel="samples per second", xticks=RANKS, xticklabels=RANKS)
    rate.title.set_fontsize(7)
    rate.legend()
    rate.minorticks_off()
    shown = ("compute", "exposed", "gather", "scalars", "update")
    for offset, name in zip((-0.2, 0.2), GRADIENTS, strict=True):
        base = [0.0] * len(RANKS)
        mine = [line for line in found if line["contender"] == name]
        for part, colour in zip(shown, ("#2563eb", "#d97706", "#059669", "#71717a", "#7c3aed"), strict=True):
            values = [line[part] for line in mine]
            places = [index + offset for index in range(len(RANKS))]
            label = part if name == "erasediff" else None
            parts.bar(places, values, 0.36, bottom=base, color=colour, label=label)
            base = [low + value for low, value in zip(base, values, strict=True)]
    parts.set(title="seconds per step: EraseDiff left, tuning right", xlabel="GPUs", xticks=range(len(RANKS)))
    parts.title.set_fontsize(9)
    parts.set_xticklabels(RANKS)
    parts.legend(fontsize=7, loc="lower right")
    assumed = "  ".join(f"{name} {value:.4g}" for name, value in first["assumptions"].items())
    half = assumed.find("  ", len(assumed) // 2)
    figure.supxlabel(f"A model, not a measurement. Assumed: {assumed[:half]}\n{assumed[half:]}", fontsize=6)
    save_figure(figure, path)


def main() -> None:
    path = RESULTS / "scaling.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    found = read(path)
    draw(found, RESULTS / "scaling.svg")
    for ours, plain in zip(found[: len(RANKS)], found[len(RANKS) :], strict=True):
        print(
            f"{ours['ranks']:4} GPUs: {ours['samples_per_second']:9.1f} samples/s, fine-tuning "
            f"{plain['samples_per_second']:9.1f}: {ours['seconds'] / plain['seconds']:.4f} x its time"
        )


if __name__ == "__main__":
    main()
