"""Train a complete small Stable Diffusion on Fashion-MNIST, once, into a cache folder.

``python benchmarks/nano_sd/train.py`` leaves there

    model/      the pipeline, as any Stable Diffusion 1.x checkpoint
    data/       the 60,000 training images as a captioned folder, for forget and retain sets
    latents/    their latents and text embeddings, as the engine caches them
    judge/      a classifier of the real images, with its accuracy on the test split
    base.json   what the judge sees in the model's images; base.png shows them

What is there is not made again, so an interrupted training goes on with the same command.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from denoiser import train_denoiser, write_untrained
from fashion import DEBIAN_FOLDER, load, write_folder
from judge import Judge, train_judge
from measure import CACHE, measure
from rich.console import Console
from text import build_tokenizer, train_text_encoder
from vae import train_vae

from erasediff.errors import UserError
from erasediff.runs.atomic import atomic_write


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Steps of each training, and the seed of all; together about 50 minutes of one core."""

    judge: int = 1800
    text_encoder: int = 400
    vae: int = 2000
    denoiser: int = 7000
    seed: int = 0

    def scaled(self, effort: float) -> Settings:
        steps = {name: max(20, round(effort * count)) for name, count in asdict(self).items() if name != "seed"}
        return Settings(**steps, seed=self.seed)


def main(
    cache: Annotated[Path, typer.Option(help="Where everything is kept.")] = CACHE,
    data: Annotated[
        Path, typer.Option(help="Folder with Fashion-MNIST's .gz files, as in Debian's dataset-fashion-mnist.")
    ] = DEBIAN_FOLDER,
    effort: Annotated[float, typer.Option(help="Share of the training's steps; for a trial.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of weights, batches and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; the weights are not the same.")] = "cpu",
) -> None:
    console = Console(stderr=True)
    try:
        train(cache, data, Settings(seed=seed).scaled(effort), console, device)
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None


def train(cache: Path, data: Path, settings: Settings, console: Console, device: str = "cpu") -> None:
    """Make what is missing in ``cache``. UserError if it was made with other settings, or the data is not there."""
    _check_settings(cache / "settings.json", settings)
    begun = time.monotonic()

    def missing(name: str) -> bool:
        return not (cache / name).exists()

    clothes = load(data, "train")
    if missing("data/metadata.jsonl"):
        console.print("Writing the captioned folder")
        write_folder(clothes, cache / "data")
    if missing("judge"):
        train_judge(clothes, load(data, "t10k"), settings.judge, settings.seed, console, device).save(cache / "judge")
    if missing("untrained"):
        tokenizer = build_tokenizer()
        text_encoder, _ = train_text_encoder(clothes, tokenizer, settings.text_encoder, settings.seed, console, device)
        vae, _ = train_vae(clothes, settings.vae, settings.seed, console, device)
        write_untrained(cache / "untrained", vae, text_encoder, tokenizer, settings.seed)
    if missing("model"):
        train_denoiser(
            cache / "untrained",
            cache / "data",
            cache / "latents",
            cache / "run",
            cache / "model",
            settings.denoiser,
            settings.seed,
            console,
            device,
        )
    if missing("base.json"):
        judge = Judge.load(cache / "judge")
        found = measure(
            cache / "model", judge, data, 100, settings.seed, grid=cache / "base.png", console=console, device=device
        )
        atomic_write(cache / "base.json", json.dumps(found, indent=1) + "\n")
    print((cache / "base.json").read_text())
    console.print(f"{cache / 'model'} is ready, {time.monotonic() - begun:.0f} seconds after the start.")


def _check_settings(path: Path, settings: Settings) -> None:
    written = json.dumps(asdict(settings)) + "\n"
    if not path.exists():
        atomic_write(path, written)
    elif path.read_text() != written:
        raise UserError(f"{path.parent} holds a model of other settings: remove it, or choose another --cache.")


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    typer.run(main)
