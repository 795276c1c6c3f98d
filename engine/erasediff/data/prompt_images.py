"""Synthetic images of prompts, drawn once by the original model into a cached image folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.data.image_folder import CaptionedImage, read_captioned_images
from erasediff.data.metadata import FILE_COLUMN
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_file, atomic_write
from erasediff.io.user_file import read_text
from erasediff.utils.progress import progress_bar
from erasediff_kernels import philox_bits

FORMAT = 1
CHUNK = 16


class Sampler(Protocol):
    """A text-to-image model that draws images of prompts."""

    @property
    def hash(self) -> str: ...

    def denoiser_hash(self) -> str: ...

    def sample(
        self,
        prompts: Sequence[str],
        *,
        guidance_scale: float | None,
        num_inference_steps: int,
        height: int | None,
        width: int | None,
        seed: int,
        batch_size: int,
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        """uint8 images [N, H, W, 3]; image i begins with the noise addressed by (seed, i)."""
        ...


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file, one per line; blank lines and those that begin with # do not count.

    Raises:
        UserError: for a file that cannot be read or has no prompts.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"Cannot read the prompts in {path}: give a UTF-8 text file.") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"There are no prompts in {path}: write one per line.")
    return prompts


def synthesise(
    model: Sampler,
    prompts: Sequence[str],
    cache: Path,
    console: Console,
    *,
    count: int,
    guidance_scale: float | None = None,
    num_inference_steps: int = 30,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
) -> list[CaptionedImage]:
    """Draw ``count`` images of each prompt, captioned with it, in a folder of ``cache`` named after all they depend on.

    The folder is an ordinary image folder with ``metadata.jsonl``, which is written last: interrupted synthesis is
    continued, and finished images are only listed. Each image's noise is its own, whatever ``batch_size`` and
    interruptions.

    Args:
        model: draws the images.
        prompts: any number.
        cache: the folder of the cache.
        console: for a progress bar.
        count: images of each prompt.
        guidance_scale: None for the model's default.
        num_inference_steps: of the sampler.
        height: in pixels; None for the model's default.
        width: in pixels; None for the model's default.
        seed: of the noise.
        batch_size: images drawn at once.

    Raises:
        UserError: for no prompts, a ``count`` below 1, a size that the model does not have, and what the disk refuses.
    """
    if not prompts or count < 1:
        raise UserError("There is nothing to synthesise: give at least one prompt, and at least one image for each.")
    settings = {
        "format": FORMAT,
        "model": [model.hash, model.denoiser_hash()],
        "prompts": list(prompts),
        "count": count,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "size": [height, width],
        "seed": seed,
    }
    folder = cache / f"synthesised-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]}"
    if (folder / "metadata.jsonl").is_file():
        return read_captioned_images(folder)

    image_prompts = [prompt for prompt in prompts for _ in range(count)]
    files = [folder / f"{number:06d}.png" for number in range(len(image_prompts))]
    seeds = _seeds(seed, -(-len(image_prompts) // CHUNK))
    with progress_bar(console, "Synthesising images", len(image_prompts)) as bar:
        for chunk, first in enumerate(range(0, len(image_prompts), CHUNK)):
            paths = files[first : first + CHUNK]
            if all(file.is_file() for file in paths):
                bar.advance(len(paths))
                continue
            images = model.sample(
                image_prompts[first : first + CHUNK],
                guidance_scale=guidance_scale,
                num_inference_steps=num_inference_steps,
                height=height,
                width=width,
                seed=seeds[chunk],
                batch_size=batch_size,
                progress=bar.advance,
            )
            for file, image in zip(paths, images, strict=True):
                with atomic_file(file) as partial:
                    Image.fromarray(image.numpy()).save(partial, format="PNG")
    rows = [{FILE_COLUMN: file.name, "text": prompt} for file, prompt in zip(files, image_prompts, strict=True)]
    atomic_write(folder / "synthesis.json", json.dumps(settings, indent=1) + "\n")
    atomic_write(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return read_captioned_images(folder)


def _seeds(seed: int, count: int) -> list[int]:
    """A seed for each chunk, so that a chunk can be drawn again without those before it."""
    words = philox_bits(torch.arange(count), noise_key(seed, 0, "cpu"), NoiseRole.SYNTHESIS_SEED, 1)[:, 0]
    seeds: list[int] = words.tolist()
    return seeds
