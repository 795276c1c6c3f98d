"""Loading of diffusion models: diffusers folder, single file or hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from erasediff.errors import UserError
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.models.family import family_of_pipeline
from erasediff.models.pixel_unet import PixelModel
from erasediff.models.unprompted_latents import UnpromptedLatentModel


def load_diffusion_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Path | None = None,
    prediction_type: str | None = None,
    empty: bool = False,
) -> CheckpointModel:
    """Load a diffusion model of any family. Nothing is unpickled.

    Args:
        source: A diffusers folder, that of a UNet2DModel alone, a single .safetensors file (SD 1.x, 2.x, SDXL), or a
            hub id.
        dtype: Dtype of denoiser and text encoders; the autoencoder is float32.
        device: Device of all components.
        config: For a single file of unusual size, or without access to the hub: a diffusers folder whose configurations
            and tokenizers it takes.
        prediction_type: For a single file that does not say it, "epsilon" or "v_prediction".
        empty: Leave the denoiser's parameters on the meta device; ``denoiser_weights`` reads them one by one.

    Raises:
        UserError: The source is missing, incomplete, damaged, a pickle, of no known family, or its parts contradict
            each other; before any weight is read.
    """
    checkpoint = open_checkpoint(source, config=config, prediction_type=prediction_type)
    family = family_of_pipeline(checkpoint.index.get("_class_name"), source)
    return family(checkpoint, dtype=dtype, device=device, empty=empty)


def load_text_to_image(source: str | Path, **options: Any) -> LatentModel:
    """Load a model with prompts; arguments and errors as of ``load_diffusion_model``. UserError for one without."""
    model = load_diffusion_model(source, **options)
    if not isinstance(model, LatentModel):
        raise UserError(f"{source} is a {model.pipeline_class.__name__}, which takes no prompts.")
    return model


def load_unprompted(
    source: str | Path, device: torch.device | str = "cpu", *, empty: bool = False
) -> PixelModel | UnpromptedLatentModel:
    """Load a model without prompts in float32. UserError as ``load_diffusion_model``, and for one with prompts."""
    model = load_diffusion_model(source, device=device, empty=empty)
    if not isinstance(model, PixelModel | UnpromptedLatentModel):
        raise UserError(f"{source} is a {model.pipeline_class.__name__}, which takes prompts.")
    return model
