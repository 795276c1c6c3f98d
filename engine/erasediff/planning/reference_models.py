"""Denoisers without weights: from a known model's name, a checkpoint's configurations, or one configuration file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.models.checkpoint.base import has, read_json
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.models.load import open_checkpoint

FLUX_1_DEV: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""FLUX.1-dev's transformer, 11.90 billion parameters (its published config.json)."""

KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "sd15": (KNOWN_CONFIGS["sd1"]["unet"], 512),
    "sd21": (KNOWN_CONFIGS["sd2"]["unet"], 768),
    "sdxl": (KNOWN_CONFIGS["sdxl"]["unet"], 1024),
    "flux": (FLUX_1_DEV, 1024),
}
"""Configuration and usual resolution in pixels."""

CLIP_TOKENS, T5_TOKENS_SD3, T5_TOKENS_FLUX = 77, 256, 512
"""Length of a prompt's embedding in the families' pipelines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A denoiser on the meta device, and what it is called with.

    resolution:   height and width in pixels of the images it is planned for, the longer side of a model's own
    latent_scale: pixels per latent along one side; 1 for a model of pixels
    """

    name: str
    module: nn.Module
    resolution: int
    latent_scale: int = 8

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, adapters aside."""
        return next(self.module.parameters()).dtype

    def inputs(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        """Keyword arguments of the module's forward for ``batch_size`` samples, floats in ``dtype``."""
        config: Any = self.module.config
        side = self.resolution // self.latent_scale

        def floats(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        timestep = torch.zeros(batch_size, device=device)
        match type(self.module).__name__:
            case "UNet2DConditionModel":
                inputs: dict[str, Any] = {
                    "sample": floats(config.in_channels, side, side),
                    "encoder_hidden_states": floats(CLIP_TOKENS, config.cross_attention_dim),
                }
                if config.addition_embed_type == "text_time":
                    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                    inputs["added_cond_kwargs"] = {"text_embeds": floats(pooled), "time_ids": floats(6)}
            case "UNet2DModel":
                inputs = {"sample": floats(config.in_channels, side, side)}
                if config.num_class_embeds:
                    inputs["class_labels"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
            case "SD3Transformer2DModel":
                inputs = {
                    "hidden_states": floats(config.in_channels, side, side),
                    "encoder_hidden_states": floats(CLIP_TOKENS + T5_TOKENS_SD3, config.joint_attention_dim),
                    "pooled_projections": floats(config.pooled_projection_dim),
                }
            case "FluxTransformer2DModel":
                tokens = (side // 2) ** 2
                inputs = {
                    "hidden_states": floats(tokens, config.in_channels),
                    "encoder_hidden_states": floats(T5_TOKENS_FLUX, config.joint_attention_dim),
                    "pooled_projections": floats(config.pooled_projection_dim),
                    "img_ids": torch.zeros(tokens, 3, dtype=dtype, device=device),
                    "txt_ids": torch.zeros(T5_TOKENS_FLUX, 3, dtype=dtype, device=device),
                    "guidance": torch.ones(batch_size, device=device) if config.guidance_embeds else None,
                }
            case other:
                raise UserError(f"A {other} cannot be planned: give a UNet of SD or SDXL, SD3's transformer or FLUX's.")
        return {**inputs, "timestep": timestep, "return_dict": False}


def network_of(source: str, resolution: int | None = None, dtype: torch.dtype = torch.float32) -> Network:
    """The denoiser that ``source`` stands for, its parameters on the meta device; no weight is read.

    source:     a name in ``KNOWN``; a diffusers folder, .safetensors file or hub id; or the ``config.json`` of a
                denoiser
    resolution: in pixels; None for what the model was made for
    dtype:      of the weights

    UserError for a source that is none of these, and for a resolution that the network cannot take.
    """
    if source in KNOWN:
        config, usual = KNOWN[source]
        network = Network(name=source, module=_empty(config), resolution=resolution or usual)
    elif source.endswith(".json"):
        config = read_json(Path(source))
        network = _with_usual_resolution(Path(source).parent.name or source, _empty(config), resolution)
    else:
        checkpoint = open_checkpoint(source)
        component = next((name for name in ("unet", "transformer") if has(checkpoint, name)), None)
        if component is None:
            raise UserError(f"{source} has neither a unet nor a transformer that could be planned.")
        module = empty_module(checkpoint, component)
        scale = 2 ** (len(checkpoint.config("vae")["block_out_channels"]) - 1) if has(checkpoint, "vae") else 1
        network = _with_usual_resolution(Path(source).name, module, resolution, scale)
    # diffusers' own ``to`` warns of modules kept in float32 even where there are none.
    nn.Module.to(network.module, dtype)
    return _checked(network)


def _empty(config: dict[str, Any]) -> nn.Module:
    name = config.get("_class_name", "")
    cls: Any = getattr(diffusers, name, None)
    if not hasattr(cls, "from_config"):
        raise UserError(f"The configuration is of {name or 'no class'}, which is not a denoiser of diffusers.")
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = cls.from_config(config)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"The configuration of a {name} is damaged: {' '.join(str(error).split())}.") from error
    return module


def _with_usual_resolution(name: str, module: nn.Module, resolution: int | None, scale: int = 8) -> Network:
    config: Any = module.config
    is_pixel = type(module).__name__ == "UNet2DModel"
    scale = 1 if is_pixel else scale
    # FLUX's configuration does not say what it was trained for: about one megapixel.
    side = getattr(config, "sample_size", None) or 128
    usual = scale * (side if isinstance(side, int) else max(side))
    return Network(name=name, module=module, resolution=resolution or usual, latent_scale=scale)


def _checked(network: Network) -> Network:
    levels = len(getattr(network.module.config, "block_out_channels", (1, 1)))
    multiple = network.latent_scale * 2 ** (levels - 1)
    if network.resolution < multiple or network.resolution % multiple:
        raise UserError(
            f"{network.name} takes images whose sides are multiples of {multiple}: not {network.resolution}."
        )
    return network
