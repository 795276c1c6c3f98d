"""Denoisers without weights: from a known model's name, a checkpoint's configurations, or one configuration file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DModel
from torch import nn

from erasediff.errors import UserError
from erasediff.models.checkpoint.base import has, read_json
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.family import families, family_of_denoiser, sides, vae_scale
from erasediff.models.load import open_checkpoint
from erasediff.models.pixel_unet import is_pixel_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Denoiser on the meta device, and the inputs of its forward pass.

    Attributes:
        name: Name that the user gave.
        module: The denoiser.
        resolution: Height and width in pixels of the images it is planned for, by default the longer side of those that
            the model was trained for.
        latent_scale: Pixels per latent along one side; 1 for a model of pixels.
    """

    name: str
    module: nn.Module
    resolution: int
    latent_scale: int = 8

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, without adapters."""
        return next(self.module.parameters()).dtype

    def inputs(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        """Keyword arguments of the module's forward for ``batch_size`` samples, floats in ``dtype``.

        Raises:
            UserError: The module is a denoiser of no family.
        """
        config: Any = self.module.config
        side = self.resolution // self.latent_scale
        family = family_of_denoiser(self.module)
        if family is not None:
            inputs = family.dummy_inputs(config, batch_size, (side, side), dtype, device)
        elif isinstance(self.module, UNet2DModel):
            inputs = {"sample": torch.zeros(batch_size, config.in_channels, side, side, dtype=dtype, device=device)}
            if config.num_class_embeds:
                inputs["class_labels"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        else:
            known = sorted({cls.denoiser_class.__name__ for cls in families().values()} | {UNet2DModel.__name__})
            raise UserError(f"A {type(self.module).__name__} cannot be planned: give one of {', '.join(known)}.")
        return {**inputs, "timestep": torch.zeros(batch_size, device=device), "return_dict": False}


def network_of(source: str, resolution: int | None = None, dtype: torch.dtype = torch.float32) -> Network:
    """Build the denoiser of ``source`` on the meta device, without reading weights.

    Args:
        source: A name among the families' ``reference_configs``; a diffusers folder, .safetensors file or hub id; or
            the ``config.json`` of a denoiser.
        resolution: In pixels; None for what the model was made for.
        dtype: Of the weights.

    Raises:
        UserError: The source is none of these, or the network cannot take the resolution.
    """
    references = {name: entry for cls in families().values() for name, entry in cls.reference_configs.items()}
    if source in references:
        config, default = references[source]
        network = Network(name=source, module=_empty(config), resolution=resolution or default)
    elif source.endswith(".json") or _is_network_alone(Path(source)):
        config = read_json(Path(source) if source.endswith(".json") else Path(source, "config.json"))
        network = _with_resolution(Path(source).parent.name or source, _empty(config), resolution, 8)
    else:
        checkpoint = open_checkpoint(source)
        components = {cls.denoiser_component: None for cls in families().values()}
        component = next((name for name in components if has(checkpoint, name)), None)
        if component is None:
            raise UserError(f"{source} has no {' or '.join(components)} that could be planned.")
        module = empty_module(checkpoint, component)
        scale = vae_scale(checkpoint.config("vae")) if has(checkpoint, "vae") else 1
        network = _with_resolution(Path(source).name, module, resolution, scale)
    # diffusers' own ``to`` warns of modules kept in float32 even where there are none.
    nn.Module.to(network.module, dtype)
    return _checked(network)


def _is_network_alone(folder: Path) -> bool:
    """Return true for the folder of a UNet2DModel that belongs to no pipeline."""
    return is_pixel_model(folder) and not (folder / "model_index.json").exists()


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


def _with_resolution(name: str, module: nn.Module, resolution: int | None, scale: int) -> Network:
    config: Any = module.config
    scale = 1 if isinstance(module, UNet2DModel) else scale
    if resolution is None:
        family = family_of_denoiser(module)
        resolution = scale * max(sides(config) if family is None else family.default_latent_size(config))
    return Network(name=name, module=module, resolution=resolution, latent_scale=scale)


def _checked(network: Network) -> Network:
    levels = len(getattr(network.module.config, "block_out_channels", (1, 1)))
    multiple = network.latent_scale * 2 ** (levels - 1)
    if network.resolution < multiple or network.resolution % multiple:
        raise UserError(
            f"{network.name} takes images whose sides are multiples of {multiple}: not {network.resolution}."
        )
    return network
