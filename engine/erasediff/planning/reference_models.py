"""Denoisers without weights: from a known model's name, a checkpoint's configurations, or one configuration file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from erasediff.errors import UserError, reason
from erasediff.models.checkpoint.base import has, read_json
from erasediff.models.checkpoint.components import empty_module
from erasediff.models.checkpoint.network_folder import is_network_alone
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.models.family import families, family_of_denoiser, vae_scale

DEFAULT_SCALE = 8
"""Pixels per latent of a denoiser whose autoencoder is not known."""


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
    latent_scale: int = DEFAULT_SCALE

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, without adapters."""
        return next(self.module.parameters()).dtype

    @property
    def family(self) -> type[CheckpointModel]:
        """The family whose denoiser it is. UserError if it is of none."""
        family = family_of_denoiser(self.module)
        if family is None:
            known = sorted({cls.denoiser_class.__name__ for cls in families().values()})
            raise UserError(f"A {type(self.module).__name__} cannot be planned: give one of {', '.join(known)}.")
        return family

    def inputs(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
        """Keyword arguments of the module's forward for ``batch_size`` samples, floats in ``dtype``.

        Raises:
            UserError: The module is a denoiser of no family.
        """
        side = self.resolution // self.latent_scale
        inputs = self.family.dummy_inputs(self.module.config, batch_size, (side, side), dtype, device)
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
    elif source.endswith(".json") or is_network_alone(Path(source)):
        config = read_json(Path(source) if source.endswith(".json") else Path(source, "config.json"))
        network = _with_resolution(Path(source).parent.name or source, _empty(config), resolution)
    else:
        checkpoint = open_checkpoint(source)
        components = {cls.denoiser_component: None for cls in families().values()}
        component = next((name for name in components if has(checkpoint, name)), None)
        if component is None:
            raise UserError(f"{source} has no {' or '.join(components)} that could be planned.")
        module = empty_module(checkpoint, component)
        autoencoders = dict.fromkeys(cls.autoencoder_component for cls in families().values())
        autoencoder = next((name for name in autoencoders if name is not None and has(checkpoint, name)), None)
        scale = 1 if autoencoder is None else vae_scale(checkpoint.config(autoencoder))
        network = _with_resolution(Path(source).name, module, resolution, scale)
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
        raise UserError(f"The configuration of a {name} is damaged: {reason(error)}.") from error
    return module


def _with_resolution(name: str, module: nn.Module, resolution: int | None, scale: int | None = None) -> Network:
    """The network at ``resolution``, or that of its configuration; ``scale`` is None where no autoencoder is known."""
    network = Network(name=name, module=module, resolution=resolution or 0)
    if scale is None:
        scale = 1 if network.family.autoencoder_component is None else DEFAULT_SCALE
    if resolution is None:
        resolution = scale * max(network.family.default_latent_size(module.config))
    return replace(network, resolution=resolution, latent_scale=scale)


def _checked(network: Network) -> Network:
    levels = len(getattr(network.module.config, "block_out_channels", (1, 1)))
    multiple = network.latent_scale * 2 ** (levels - 1)
    if network.resolution < multiple or network.resolution % multiple:
        raise UserError(
            f"{network.name} takes images whose sides are multiples of {multiple}: not {network.resolution}."
        )
    return network
