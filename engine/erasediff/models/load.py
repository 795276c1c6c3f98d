"""A checkpoint of a known family from wherever a user has it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from erasediff.errors import UserError
from erasediff.models.base import LatentModel, TextToImageModel
from erasediff.models.checkpoint.base import HOW_TO_CONVERT, PICKLES, Checkpoint
from erasediff.models.checkpoint.diffusers_folder import DiffusersFolder
from erasediff.models.checkpoint.hub import downloaded
from erasediff.models.checkpoint.single_file import SingleFile
from erasediff.models.flux import Flux
from erasediff.models.sd3 import StableDiffusion3
from erasediff.models.stable_diffusion import StableDiffusion, StableDiffusionXL

PIPELINES: dict[str, type[LatentModel]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
}
"""By the "_class_name" of model_index.json. A new family is one file and one line here."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("model_index.json", *(f"*/*.{suffix}" for suffix in ("json", "txt", "model", "safetensors")))
VARIANTS = ("*.fp16.*", "*.fp16-*", "*non_ema*", "*.bf16.*", "*.fp32.*", "*openvino*", "*flax*")


def load_text_to_image(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Path | None = None,
    prediction_type: str | None = None,
    empty: bool = False,
) -> TextToImageModel:
    """The model in ``source``: a diffusers folder, a single .safetensors file (SD 1.x, 2.x, SDXL), or a hub id.

    dtype:           of denoiser and text encoders; the VAE is float32
    config:          for a single file of unusual size, or without access to the hub: a diffusers folder whose
                     configurations and tokenizers it takes
    prediction_type: for a single file that does not say it, "epsilon" or "v_prediction"
    empty:           leave the denoiser's parameters on the meta device; ``denoiser_weights`` reads them one by one

    Nothing is unpickled. UserError, before any weight is read, for a source that is missing, incomplete, damaged, a
    pickle, of no known family, or whose parts contradict each other.
    """
    checkpoint = open_checkpoint(source, config=config, prediction_type=prediction_type)
    name = checkpoint.index.get("_class_name")
    if name not in PIPELINES:
        raise UserError(f"{source} is a {name}, which is not among the families known here: {', '.join(PIPELINES)}.")
    return PIPELINES[name](checkpoint, dtype=dtype, device=device, empty=empty)


def open_checkpoint(
    source: str | Path, *, config: Path | None = None, prediction_type: str | None = None
) -> Checkpoint:
    """The checkpoint in ``source``, of whose weights nothing but names and shapes is read; arguments as above.

    ``components.empty_module`` makes its modules on the meta device, to count what training would take.
    """
    path = Path(source)
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise UserError(f"{source} is a pickle, which can run code when it is opened: {HOW_TO_CONVERT}")
    if path.suffix == ".safetensors":
        return SingleFile(path, config=config, prediction_type=prediction_type)
    if path.is_dir():
        return DiffusersFolder(path)
    if path.exists():
        raise UserError(f"{source} is neither a diffusers folder nor a .safetensors file.")
    if HUB_ID.fullmatch(str(source)):
        return DiffusersFolder(downloaded(str(source), FILES, VARIANTS))
    raise UserError(f"{source} does not exist.")
