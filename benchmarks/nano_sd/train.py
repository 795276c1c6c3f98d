"""A complete small Stable Diffusion of Fashion-MNIST, in a cache folder: as it was trained before, or trained anew.

``python benchmarks/nano_sd/train.py`` leaves there

    model/      the pipeline, as any Stable Diffusion 1.x checkpoint
    data/       the 60,000 training images as a captioned folder, for forget and retain sets
    judge/      a classifier of the real images, with its accuracy on the test split
    base.json   what the judge sees in the model's images; base.png shows them

The weights come from ``trained/`` beside this script, so that results from different machines are of the same model.
With ``--anew`` they are trained here, which leaves ``latents/``, too: the images' latents and text embeddings, as the
engine caches them. What is there is not made again, so an interrupted training goes on with the same command.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from denoiser import train_denoiser, write_untrained
from fashion import DEBIAN_FOLDER, Clothes, load, write_folder
from judge import Judge, train_judge
from measure import CACHE, measure
from rich.console import Console
from text import build_tokenizer, train_text_encoder
from vae import train_vae

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, atomic_write
from erasediff.models.load import load_text_to_image

TRAINED = Path(__file__).parent / "trained"
"""The pipeline and the classifier that ``--anew`` gave on a CPU, in float16."""


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
    anew: Annotated[bool, typer.Option("--anew", help="Train here, for about 50 minutes of one core.")] = False,
    effort: Annotated[float, typer.Option(help="With --anew, the share of its steps; for a trial.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --anew, of weights, batches and noise.")] = 0,
    device: Annotated[str, typer.Option(help="With --anew, cpu or cuda; the weights are not the same.")] = "cpu",
    publish: Annotated[
        Path | None, typer.Option(help="Also write what there is to this folder, in float16, as trained/ has it.")
    ] = None,
) -> None:
    console, begun = Console(stderr=True), time.monotonic()
    try:
        if not anew and (effort, seed, device) != (1.0, 0, "cpu"):
            raise UserError("--effort, --seed and --device are of a training: give --anew, too.")
        if anew:
            train(cache, data, Settings(seed=seed).scaled(effort), console, device)
        else:
            take(cache, data, console)
        if not (cache / "base.json").exists():
            judge = Judge.load(cache / "judge")
            found = measure(
                cache / "model", judge, data, 100, seed, grid=cache / "base.png", console=console, device=device
            )
            atomic_write(cache / "base.json", json.dumps(found, indent=1) + "\n")
        if publish is not None:
            load_text_to_image(cache / "model").save(publish / "model", dtype=torch.float16)
            Judge.load(cache / "judge").half().save(publish / "judge")
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    print((cache / "base.json").read_text())
    console.print(f"{cache / 'model'} is ready, {time.monotonic() - begun:.0f} seconds after the start.")


def take(cache: Path, data: Path, console: Console) -> None:
    """Put what was trained before into ``cache``. UserError if a model trained anew is there, or the data is not."""
    _check_settings(cache / "settings.json", {"trained": "before"})
    _write_data(load(data, "train"), cache / "data", console)
    for name in ("judge", "model"):
        if not (cache / name).exists():
            with atomic_directory(cache / name) as folder:
                shutil.copytree(TRAINED / name, folder, dirs_exist_ok=True)


def train(cache: Path, data: Path, settings: Settings, console: Console, device: str = "cpu") -> None:
    """Make what is missing in ``cache``. UserError if it was made with other settings, or the data is not there."""
    _check_settings(cache / "settings.json", asdict(settings))

    def missing(name: str) -> bool:
        return not (cache / name).exists()

    clothes = load(data, "train")
    _write_data(clothes, cache / "data", console)
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


def _write_data(clothes: Clothes, folder: Path, console: Console) -> None:
    if not (folder / "metadata.jsonl").exists():
        console.print("Writing the captioned folder")
        write_folder(clothes, folder)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    written = json.dumps(settings) + "\n"
    if not path.exists():
        atomic_write(path, written)
    elif path.read_text() != written:
        raise UserError(f"{path.parent} holds a model of other settings: remove it, or choose another --cache.")


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    typer.run(main)
