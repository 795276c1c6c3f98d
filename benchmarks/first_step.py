"""Time from the start of an unlearning run to its first step, for data sets of which it sees a small part.

``python benchmarks/first_step.py folder|captions|torch [--images N] [--cache all] [--profile FILE]``. The run is one of
200 steps of 4 on a small pixel model, whose images take no encoder's time; "captions" lists what a text-to-image run
would, a text file beside each image, and stops before a model is needed.
"""

import cProfile
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from erasediff.config import Config, load_config
from erasediff.data import from_torch_dataset
from erasediff.models import PixelModel
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.latent_data import listed_images

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from record import append, environment

SIDE, CLASSES, STEPS, BATCH_SIZE = 32, 10, 200, 4


class DrawnImages:
    """Data set of torch's kind, whose images are drawn when they are asked for."""

    def __init__(self, size: int) -> None:
        self.targets = np.arange(size) % CLASSES
        self.classes = [f"class-{number}" for number in range(CLASSES)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return _pixels(number), int(self.targets[number])


def _pixels(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def write_images(folder: Path, size: int, *, captions: bool) -> None:
    """Write ``size`` PNG files into a folder per class, with a text file beside each if ``captions``."""
    for number in range(CLASSES):
        (folder / f"class-{number}").mkdir(parents=True)
    for number in range(size):
        path = folder / f"class-{number % CLASSES}/{number:07d}.png"
        Image.fromarray(_pixels(number)).save(path, compress_level=0)
        if captions:
            path.with_suffix(".txt").write_text(f"noise {number}")


def run(config: Config, size: int, source: str, folder: Path) -> dict[str, float]:
    """Seconds until each phase of a run has ended: a list of captions, or the first step."""
    times = {}
    began = time.monotonic()
    if source == "captions":
        listed_images(config.images)
        return {"listed_s": time.monotonic() - began}
    data = from_torch_dataset(DrawnImages(size)) if source == "torch" else None
    model = PixelModel.build(num_classes=CLASSES, image_shape=(3, SIDE, SIDE), block_out_channels=(8, 8))
    job = build_unlearning_job(config, model, Console(stderr=True), data=data)
    times["batches_s"] = time.monotonic() - began
    assert job.lists is not None
    job.lists.record(folder)
    print(job.lists.summary(), file=sys.stderr)
    times["recorded_s"] = time.monotonic() - began
    next(job.trial_steps(1))
    return times | {"first_step_s": time.monotonic() - began}


def main(
    source: Annotated[str, typer.Argument(help="folder, captions or torch.")],
    images: Annotated[int, typer.Option(help="Images in the data set.")] = 60_000,
    cache: Annotated[str | None, typer.Option(help="needed or all.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a profile for pstats.")] = None,
    note: Annotated[str, typer.Option(help="Kept with the result.")] = "",
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "data")
        os.environ["ERASEDIFF_CACHE"] = str(Path(name, "cache"))
        settings: dict[str, Any] = {
            "device": "cpu",
            "images.forget_classes": ["class-3"],
            "unlearn.steps": STEPS,
            "unlearn.batch_size": BATCH_SIZE,
        }
        if cache is not None:
            settings["images.cache"] = cache
        if source != "torch":
            write_images(folder, images, captions=source == "captions")
            settings["images.data"] = str(folder)
        config = load_config(None, settings)
        with cProfile.Profile() if profile else nullcontext() as profiler:
            times = run(config, images, source, Path(name))
        if profile and profiler:
            profiler.dump_stats(profile)
            return
    line = {"source": source, "images": images, "cache": cache or "needed", "note": note}
    line |= {"steps": STEPS, "batch_size": BATCH_SIZE} | {key: round(value, 2) for key, value in times.items()}
    append("first_step", [line | environment("cpu")])
    print(line)


if __name__ == "__main__":
    typer.run(main)
