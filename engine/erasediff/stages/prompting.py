"""Draw images of prompts from a text-to-image model."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from erasediff.config import Config, for_text_to_image
from erasediff.runs.atomic import check_new
from erasediff.runs.progress import progress_bar
from erasediff.stages.loading import load_checkpoint
from erasediff.stages.saemnesia import erasing
from erasediff.stages.sampling import Drawn, is_picture, write_images
from erasediff.stages.session import set_up_device


def sample_prompts(
    config: Config, model_path: Path, out: Path, console: Console, *, prompts: Sequence[str], count: int
) -> Drawn:
    """Draw ``count`` images of each prompt; ``out`` as in ``sample``. UserError as in ``load_checkpoint``."""
    if not is_picture(out):
        check_new(out)
    config = for_text_to_image(config)
    settings = config.sample
    model = load_checkpoint(config, model_path, set_up_device(config))
    asked = [prompt for prompt in prompts for _ in range(count)]
    with erasing(config, model), progress_bar(console, "Sampling", len(asked)) as bar:
        images = model.sample(
            asked,
            negative_prompt=settings.negative_prompt,
            guidance_scale=settings.guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            height=config.images.height,
            width=config.images.width,
            seed=config.seed,
            batch_size=settings.batch_size,
            progress=bar.advance,
        )
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    names = [f"prompt-{number // count}-{number:05d}" for number in range(len(asked))]
    write_images(pixels, out, names, columns=count if count > 1 else len(prompts), scale=1)
    return Drawn(images=pixels, labels=None, written=out)
