from pathlib import Path
from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages


def sample(
    model: Annotated[Path, typer.Option(help="A diffusers folder.")],
    out: Annotated[Path, typer.Option(help="An image such as grid.png, or a folder for single images.")],
    classes: Annotated[str | None, typer.Option(help="Classes to draw, such as 0,1,2; by default all.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each class, or in all without classes.")] = 50,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Draw images from a model: one grid, or a folder of single images."""
    full_config = options.configure(config, settings, sample__guidance_scale=guidance, seed=seed, device=device)
    numbers = options.class_numbers(classes)
    with loading(messages):
        from erasediff.stages import sampling
    drawn = sampling.sample(full_config, model, out, messages, classes=numbers, count=count)
    emit({"written": str(drawn.written), "images": len(drawn.images), "seed": full_config.seed}, as_json=as_json)
