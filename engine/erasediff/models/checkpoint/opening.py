"""Opening of checkpoints: diffusers folder, a denoiser's folder, single file or hub repository."""

from __future__ import annotations

from pathlib import Path

from erasediff.errors import UserError
from erasediff.models.checkpoint.base import HOW_TO_CONVERT, PICKLES, Checkpoint
from erasediff.models.checkpoint.diffusers_folder import DiffusersFolder
from erasediff.models.checkpoint.hub import downloaded, is_hub_id
from erasediff.models.checkpoint.network_folder import NetworkFolder, is_network_alone
from erasediff.models.checkpoint.single_file import SingleFile

FILES = (
    "model_index.json",
    "*.md",
    "LICEN[CS]E*",
    "NOTICE*",
    *(f"*/*.{suffix}" for suffix in ("json", "txt", "model", "safetensors")),
    # Of a network in the repository itself, as of the first pipelines.
    *("config.json", "scheduler_config.json", "classes.json", "diffusion_pytorch_model*.safetensors"),
)
VARIANTS = ("*.fp16.*", "*.fp16-*", "*non_ema*", "*.bf16.*", "*.fp32.*", "*openvino*", "*flax*")


def open_checkpoint(
    source: str | Path, *, config: Path | None = None, prediction_type: str | None = None
) -> Checkpoint:
    """Open a checkpoint: only names and shapes of its weights are read. Arguments as for ``load_diffusion_model``.

    ``components.empty_module`` makes its modules on the meta device, to count what training would take.
    """
    path = Path(source)
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise UserError(f"{source} is a pickle, which can run code when it is opened: {HOW_TO_CONVERT}")
    if path.suffix == ".safetensors":
        return SingleFile(path, config=config, prediction_type=prediction_type)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".gguf":
        raise UserError(f"{source} is quantized (GGUF): give a diffusers folder or .safetensors, unquantized.")
    if path.exists():
        raise UserError(f"{source} is neither a diffusers folder nor a .safetensors file.")
    if is_hub_id(str(source)):
        return _in_folder(downloaded(str(source), FILES, VARIANTS))
    raise UserError(f"{source} does not exist.")


def _in_folder(path: Path) -> Checkpoint:
    return NetworkFolder(path) if is_network_alone(path) else DiffusersFolder(path)
