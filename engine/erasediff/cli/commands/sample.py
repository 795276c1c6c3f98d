from pathlib import Path
from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages


def sample(
    model: Annotated[Path, typer.Option(help="A diffusers folder, a .safetensors file, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new image such as grid.png, or a new folder for single images.")],
    classes: Annotated[
        str | None, typer.Option(help="Classes to draw by number or name, such as 0,1; by default all.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Text-to-image: prompts to draw, 'a;b', or a .txt file.")] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images of each class or of each prompt, not in all; by default 50 of a class, 1 of a prompt."
        ),
    ] = None,
    lora: options.Lora = None,
    saemnesia: Annotated[
        Path | None, typer.Option(help="Text-to-image: the eraser OUT/saemnesia to attach while sampling.")
    ] = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Draw images from a model: one grid, or a folder of single images."""
    full_config = options.configure(
        config,
        settings,
        sample__guidance_scale=guidance,
        text_to_image__lora=lora,
        saemnesia__eraser=saemnesia,
        seed=seed,
        device=device,
    )
    numbers, texts = options.class_references(classes), options.prompts(prompts)
    with loading(messages):
        from erasediff.workflows.unlearn import draw_from
    drawn = draw_from(full_config, model, out, messages, classes=numbers, prompts=texts, count=count)
    emit({"written": str(drawn.written), "images": len(drawn.images), "seed": full_config.seed}, as_json=as_json)
