"""Images that a model knows by heart are unlearned by their files: ``python benchmarks/memorised/run.py``.

Trains the nano Stable Diffusion (``benchmarks/nano_sd``) on with eight images repeated until it reproduces them, hands
the list of their files to ``erasediff unlearn --forget-files``, and reads the model before, in between and afterwards.
Appends to results/memorised.jsonl and draws results/memorised.png: a row per image with the image itself, then samples
of its caption from the three models. What is there of the training is not made again.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from learning import Learning, Memorised, choose, learn_by_heart, write_request
from PIL import Image
from reading import Reader, features_of
from rich.console import Console
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file, remove_directory

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "kernels"))
from fashion import DEBIAN_FOLDER, load, prompt
from judge import Judge
from measure import CACHE
from record import RESULTS, append, environment

SHOWN = 5
UNLEARN: dict[str, str] = {
    "text_to_image.train": "full",
    "unlearn.target": "relabel",
    "unlearn.batch_size": "64",
    "unlearn.steps": "100",
    "unlearn.lr": "5e-4",
    "images.encode_batch_size": "100",
}
"""Relabelling to the plain prompts of the images' classes: what the model would draw had it not learned them."""


def unlearn(folder: Path, memorised: Memorised, settings: dict[str, str]) -> float:
    """``erasediff unlearn`` as a user runs it, into ``folder/unlearned``; returns seconds of the whole command."""
    remove_directory(folder / "unlearned")
    anchors = ";".join(prompt(label) for label in memorised.classes)
    command = [
        sys.executable,
        "-m",
        "erasediff.cli",
        "unlearn",
        "--no-verdict",
        "--model",
        folder / "model",
        "--data",
        folder / "data",
    ]
    command += ["--forget-files", folder / "forget.txt", "--out", folder / "unlearned", "--anchor-prompts", anchors]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    begun = time.monotonic()
    if subprocess.run([str(part) for part in command], check=False).returncode:
        raise UserError("erasediff unlearn failed; what it says above tells why.")
    return time.monotonic() - begun


def draw(originals: Tensor, samples: list[Tensor], path: Path) -> None:
    """``originals`` uint8 [K, H, W] and for each model [K, n, H, W], three times as large, white between them."""
    wall = torch.full((*originals.shape[:2], 4), 255, dtype=torch.uint8)
    rows = [originals]
    for drawn in samples:
        rows += [wall, drawn[:, :SHOWN].permute(0, 2, 1, 3).flatten(2)]
    sheet = torch.cat(rows, 2).flatten(0, 1)
    picture = Image.fromarray(sheet.numpy())
    with atomic_file(path) as partial:
        picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save(partial, format="PNG")


def main(
    cache: Annotated[Path, typer.Option(help="What nano_sd/train.py left.")] = CACHE,
    folder: Annotated[Path, typer.Option(help="Where the models are kept.")] = CACHE.parent / "nano-memorised",
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST.")] = DEBIAN_FOLDER,
    steps: Annotated[int, typer.Option(help="Of learning by heart.")] = Learning().steps,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Of unlearning, as in unlearn.steps=50.")] = None,
    copies: Annotated[int, typer.Option(help="Samples of each memorised image's caption.")] = 25,
    per_class: Annotated[int, typer.Option(help="Samples of each class.")] = 20,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    console = Console(stderr=True)
    try:
        run(
            cache,
            folder,
            data,
            steps,
            dict(pair.split("=", 1) for pair in set_ or []),
            copies,
            per_class,
            seed,
            console,
        )
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None


def run(
    cache: Path,
    folder: Path,
    data: Path,
    steps: int,
    changes: dict[str, str],
    copies: int,
    per_class: int,
    seed: int,
    console: Console,
) -> None:
    train, test = load(data, "train"), load(data, "t10k")
    memorised = choose(train)
    learning = Learning(steps=steps)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        write_request(memorised, cache / "data", folder)
        learn_by_heart(
            cache / "model", folder / "data", memorised, folder / "run", folder / "model", learning, seed, console
        )
    settings = UNLEARN | changes
    seconds = unlearn(folder, memorised, settings)
    judge = Judge.load(cache / "judge")
    reader = Reader(
        memorised=memorised,
        train=train,
        train_features=features_of(judge, train, folder / "features.safetensors"),
        test=test,
        judge=judge,
        copies=copies,
        per_class=per_class,
        seed=seed,
    )
    stages: dict[str, tuple[Path, dict[str, Any]]] = {
        "base": (cache / "model", {}),
        "memorised": (folder / "model", {"learning": asdict(learning)}),
        "unlearned": (folder / "unlearned" / "model", {"unlearning": settings, "seconds": round(seconds, 1)}),
    }
    lines, pictures = [], []
    for stage, (path, made) in stages.items():
        console.print(f"Reading the {stage} model")
        found, drawn = reader.read(path)
        console.print(found)
        lines.append({"benchmark": "memorised", "stage": stage, **found, **made, "seed": seed, **environment("cpu")})
        pictures.append(drawn)
    draw(train.images[memorised.index], pictures, RESULTS / "memorised.png")
    print(append("memorised", lines))


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    typer.run(main)
