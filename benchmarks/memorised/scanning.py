"""Captions that a model knows by heart, found by ``erasediff scan``: ``python benchmarks/memorised/scanning.py``.

Scans the models of ``run.py`` for the captions of the repeated images, without any image, against a control list: all
forty captions of the other 60,000 images. Appends to results/scan.jsonl. ``run.py`` learns the model by heart first; or
this script does, without the unlearning.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from learning import Learning, choose, learn_by_heart, write_request
from rich.console import Console

from erasediff.config import Config
from erasediff.workflows.scan import scan

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))
from fashion import DEBIAN_FOLDER, load
from measure import CACHE
from record import append, environment

PROTOCOLS = ((1, 1), (1, 4), (1, 32), (10, 4), (50, 4))
"""Sampling steps, and draws of the initial noise."""


def captions(data: Path, own: set[str]) -> list[str]:
    """Captions of the folder's images but those of the repeated ones."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    return sorted({row["text"] for row in rows} - own)


def main(
    cache: Annotated[Path, typer.Option(help="What nano_sd/train.py left.")] = CACHE,
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = CACHE.parent / "nano-memorised",
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST.")] = DEBIAN_FOLDER,
    stage: Annotated[list[str] | None, typer.Option(help="Of base, memorised, unlearned; by default all.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    console = Console(stderr=True)
    memorised = choose(load(data, "train"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_request(memorised, cache / "data", folder)
        learn_by_heart(
            cache / "model", folder / "data", memorised, folder / "run", folder / "model", Learning(), seed, console
        )
    control = captions(folder / "data", set(memorised.captions))
    lines = []
    stages = {"base": cache / "model", "memorised": folder / "model", "unlearned": folder / "unlearned" / "model"}
    for name, path in stages.items():
        if not path.exists() or name not in (stage or stages):
            continue
        for steps, draws in PROTOCOLS:
            with tempfile.TemporaryDirectory() as out:
                found = scan(
                    Config(seed=seed, device="cpu"),
                    path,
                    Path(out),
                    console,
                    prompts=memorised.captions,
                    control=control,
                    draws=draws,
                    steps=steps,
                )
            line = {
                "benchmark": "scan",
                "stage": name,
                "steps": steps,
                "draws": draws,
                "auc": found.auc,
                "flagged": len(found.flagged),
                "prompts": len(found.ranked),
                "control": found.control.count,
                "scores": {row.prompt: row.score for row in found.ranked},
                "control_mean": found.control.mean,
                "threshold": found.control.threshold,
            }
            lines.append({**line, "seed": seed, **environment("cpu")})
            console.print(name, steps, draws, f"AUC {found.auc:.3f}, {len(found.flagged)} of {len(found.ranked)}")
    print(append("scan", lines))


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    typer.run(main)
