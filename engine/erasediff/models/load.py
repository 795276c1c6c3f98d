"""Loading of text-to-image models: diffusers folder, single file or hub repository."""

from __future__ import annotations

from pathlib import Path

import torch

from erasediff.errors import UserError
from erasediff.models.base import LatentModel
from erasediff.models.checkpoint.base import HOW_TO_CONVERT, PICKLES, Checkpoint
from erasediff.models.checkpoint.diffusers_folder import DiffusersFolder
from erasediff.models.checkpoint.hub import downloaded, is_hub_id
from erasediff.models.checkpoint.single_file import SingleFile
from erasediff.models.family import family_of_pipeline

FILES = (
    "model_index.json",
    "*.md",
    "LICEN[CS]E*",
    "NOTICE*",
    *(f"*/*.{suffix}" for suffix in ("json", "txt", "model", "safetensors")),
)
VARIANTS = ("*.fp16.*", "*.fp16-*", "*non_ema*", "*.bf16.*", "*.fp32.*", "*openvino*", "*flax*")


def load_text_to_image(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: Path | None = None,
    prediction_type: str | None = None,
    empty: bool = False,
) -> LatentModel:
    """Load a text-to-image model. Nothing is unpickled.

    Args:
        source: A diffusers folder, a single .safetensors file (SD 1.x, 2.x, SDXL), or a hub id.
        dtype: Dtype of denoiser and text encoders; the VAE is float32.
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


def open_checkpoint(
    source: str | Path, *, config: Path | None = None, prediction_type: str | None = None
) -> Checkpoint:
    """Open a checkpoint: only names and shapes of its weights are read. Arguments as for ``load_text_to_image``.

    ``components.empty_module`` makes its modules on the meta device, to count what training would take.
    """
    path = Path(source)
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise UserError(f"{source} is a pickle, which can run code when it is opened: {HOW_TO_CONVERT}")
    if path.suffix == ".safetensors":
        return SingleFile(path, config=config, prediction_type=prediction_type)
    if path.is_dir():
        return DiffusersFolder(path)
    if path.suffix == ".gguf":
        raise UserError(f"{source} is quantized (GGUF): give a diffusers folder or .safetensors, unquantized.")
    if path.exists():
        raise UserError(f"{source} is neither a diffusers folder nor a .safetensors file.")
    if is_hub_id(str(source)):
        return DiffusersFolder(downloaded(str(source), FILES, VARIANTS))
    raise UserError(f"{source} does not exist.")
