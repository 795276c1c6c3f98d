"""Two small pixel models of Fashion-MNIST, class-conditional and unconditional: as trained before, or trained anew.

``python benchmarks/fashion_pixels/train.py`` leaves in ``~/.cache/erasediff/fashion-pixels`` (or ``--cache``)

    fashion.npz        the 60,000 training images, 28 x 28, with labels and class names
    class-conditional/ a DDPMPipeline with a class embedding per garment and the null label's
    unconditional/     one without

The weights come from ``trained/`` beside this script. With ``--anew`` they are trained here by ``erasediff train``, for
about 25 minutes of one core; an interrupted training goes on with the same command.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory, atomic_file
from erasediff.io.cache_dir import cache_folder

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
from fashion import CLASSES, DEBIAN_FOLDER, SIZE, load

CACHE = cache_folder() / "fashion-pixels"
TRAINED = Path(__file__).parent / "trained"
"""What ``--anew`` gave on a CPU, in float16."""

KINDS = ("class-conditional", "unconditional")
STEPS = {"class-conditional": 3000, "unconditional": 2600}
MARGIN = (SIZE - 28) // 2
"""Black rows and columns around the 28 x 28 published pixels in ``fashion.load`` and the classifier's inputs."""

SETTINGS = {
    "train.batch_size": 64,
    "train.lr": 2e-3,
    "train.warmup_steps": 100,
    "train.ema_decay": 0.995,
    "train.min_snr_gamma": 5,
    "run.checkpoint_every": 500,
    "run.keep_checkpoints": 1,
    "precision": "bf16-mixed",
    "threads": 1,
}


def main(
    cache: Annotated[Path, typer.Option(help="Where everything is kept.")] = CACHE,
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST's four .gz files.")] = DEBIAN_FOLDER,
    anew: Annotated[bool, typer.Option("--anew", help="Train here, for about 25 minutes of one core.")] = False,
    publish: Annotated[
        Path | None, typer.Option(help="Also write the models to this folder, in float16, as trained/ has them.")
    ] = None,
) -> None:
    console = Console(stderr=True)
    try:
        write_data(data, cache / "fashion.npz")
        for kind in KINDS:
            if not (cache / kind).exists():
                if anew:
                    train(cache, kind)
                else:
                    convert(TRAINED / kind, cache / kind, torch.float32)
            if publish is not None:
                convert(cache / kind, publish / kind, torch.float16)
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    console.print(f"{cache} is ready.", highlight=False)


def write_data(folder: Path, out: Path) -> None:
    """Write the train split as an .npz, as users have such data. UserError if the published files are not there."""
    if out.exists():
        return
    clothes = load(folder, "train")
    images = clothes.images[:, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as partial, partial.open("wb") as file:  # np.savez would add a suffix to a name
        np.savez(file, images=images, labels=clothes.labels.numpy(), class_names=np.array(CLASSES))


def train(cache: Path, kind: str) -> None:
    """Train the model of ``kind`` as a user would, in the run folder ``cache``/run-KIND."""
    run = cache / f"run-{kind}"
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    settings += ["--data", str(cache / "fashion.npz"), "--steps", str(STEPS[kind])]
    settings += ["--unconditional"] if kind == "unconditional" else []
    command = ["erasediff", "train", "--out", str(run)]
    subprocess.run([*command, *(["--resume", "latest"] if run.exists() else settings)], check=True)
    convert(run / "model", cache / kind, torch.float32)


def convert(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Copy a pipeline's folder with its weights in ``dtype``: float16 to be published, float32 to be unlearned from."""
    with atomic_directory(out) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for file in folder.glob("*/*.safetensors"):
            save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


if __name__ == "__main__":
    typer.run(main)
