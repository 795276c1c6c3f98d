"""Measure a checkpoint: how often the judge sees what the prompt says, and how far its images are from real ones.

``python benchmarks/nano_sd/measure.py MODEL`` prints one JSON object; ``--grid FILE.png`` draws a row per class,
``--record NAME`` appends the object to ``results/nano_sd.jsonl`` under that name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fashion import CLASSES, DEBIAN_FOLDER, load, prompt
from judge import Judge
from PIL import Image
from pixels import as_grey
from rich.console import Console
from torch import Tensor

from erasediff.errors import UserError
from erasediff.evaluation.distances import frechet_distance, kernel_distance
from erasediff.io.atomic import atomic_file
from erasediff.io.cache_dir import cache_folder
from erasediff.models.load import load_text_to_image
from erasediff.sae import ConceptEraser
from erasediff.utils.progress import progress_bar

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from record import append, environment

GUIDANCE_SCALE = 3.0
INFERENCE_STEPS = 25
CACHE = cache_folder() / "nano-sd"


def main(
    model: Annotated[Path, typer.Argument(help="A checkpoint with this text encoder, in any layout.")] = CACHE
    / "model",
    count: Annotated[int, typer.Option(help="Images per class.")] = 40,
    saemnesia: Annotated[
        Path | None, typer.Option(help="The folder OUT/saemnesia of concepts to erase while sampling.")
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="Draw the first ten of each class here.")] = None,
    forgotten: Annotated[
        str | None, typer.Option(help="Also tell the other classes' numbers without this one.")
    ] = None,
    record: Annotated[str | None, typer.Option(help="Also append the object to the committed results.")] = None,
    judge: Annotated[Path, typer.Option(help="The classifier that train.py left.")] = CACHE / "judge",
    data: Annotated[Path, typer.Option(help="Folder with Fashion-MNIST.")] = DEBIAN_FOLDER,
    seed: Annotated[int, typer.Option(help="Of the images.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    console = Console(stderr=True)
    try:
        found = measure(
            model,
            Judge.load(judge),
            data,
            count,
            seed,
            saemnesia=saemnesia,
            grid=grid,
            forgotten=forgotten,
            console=console,
            device=device,
        )
    except UserError as error:
        console.print(str(error), style="red", highlight=False)
        raise typer.Exit(2) from None
    print(json.dumps(found, indent=1))
    if record is not None:
        append("nano_sd", [{"model": record, "seed": seed, **found, **environment(device)}])


def measure(
    path: Path,
    judge: Judge,
    data: Path,
    count: int,
    seed: int,
    *,
    saemnesia: Path | None = None,
    grid: Path | None = None,
    forgotten: str | None = None,
    console: Console,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draws ``count`` images of each class from the checkpoint at ``path``, with the eraser in ``saemnesia`` attached.

    ``recognised`` maps each class to the share of its images in which the judge sees it; ``fid`` and ``kid`` compare
    the judge's features of all images with those of the 10,000 test images. With ``forgotten``, ``others`` holds the
    same of the images of the other classes alone. UserError for a class that does not exist.
    """
    if forgotten is not None and forgotten not in CLASSES:
        raise UserError(f"There is no class {forgotten}: choose one of {', '.join(CLASSES)}.")
    model = load_text_to_image(path, device=device)
    if saemnesia is not None:
        ConceptEraser.load(saemnesia).attach(model.denoiser)
    labels = torch.arange(len(CLASSES)).repeat_interleave(count)
    with progress_bar(console, "Sampling", len(labels)) as bar:
        drawn = model.sample(
            [prompt(label) for label in labels.tolist()],
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=INFERENCE_STEPS,
            seed=seed,
            batch_size=100,
            progress=bar.advance,
        )
    images = as_grey(drawn)
    answers, features = judge.answer(images)
    test = load(data, "t10k")
    _, real = judge.answer(test.images)
    if grid is not None:
        _draw(images.reshape(len(CLASSES), count, *images.shape[1:])[:, :10], grid)
    recognised = (answers == labels).double().reshape(len(CLASSES), count).mean(1)
    found: dict[str, Any] = {
        "judge_accuracy": judge.accuracy,
        "images_per_class": count,
        "mean_recognised": recognised.mean().item(),
        "recognised": dict(zip(CLASSES, recognised.tolist(), strict=True)),
        "fid": frechet_distance(features, real),
        "kid": kernel_distance(features, real),
    }
    if forgotten is not None:
        left = CLASSES.index(forgotten)
        features, real = features[labels != left], real[test.labels != left]
        found["others"] = {
            "mean_recognised": ((recognised.sum() - recognised[left]) / (len(CLASSES) - 1)).item(),
            "fid": frechet_distance(features, real),
            "kid": kernel_distance(features, real),
        }
    return found


def _draw(rows: Tensor, path: Path) -> None:
    """A picture of uint8 [rows, columns, H, W], each pixel twice as wide."""
    sheet = rows.permute(0, 2, 1, 3).reshape(rows.shape[0] * rows.shape[2], -1)
    picture = Image.fromarray(sheet.numpy())
    with atomic_file(path) as partial:
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(partial, format="PNG")


if __name__ == "__main__":
    typer.run(main)
