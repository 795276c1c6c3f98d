"""Pixel-space diffusion model: a UNet and its noise schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory
from erasediff.utils.finite import first_not_finite, weights_not_finite


@dataclass(frozen=True, slots=True)
class PixelModel:
    """Pixel-space UNet2DModel, unconditional or class-conditional, with the scheduler that it was trained with.

    A conditional UNet has one embedding more than classes: the last is the null label of classifier-free guidance.
    """

    unet: UNet2DModel
    scheduler: DDPMScheduler

    @classmethod
    def build(
        cls,
        *,
        num_classes: int | None,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        block_out_channels: Sequence[int] = (16, 32, 64),
        layers_per_block: int = 1,
        prediction_type: str = "v_prediction",
        beta_schedule: str = "squaredcos_cap_v2",
        num_train_timesteps: int = 1000,
        seed: int = 0,
    ) -> PixelModel:
        """Build a model with fresh weights, leaving the global random state as it was.

        Args:
            num_classes: Number of classes; None for an unconditional model.
            image_shape: (channels, height, width).
            block_out_channels: Channels of each resolution level.
            layers_per_block: Residual blocks per level.
            prediction_type: As diffusers names it.
            beta_schedule: As diffusers names it.
            num_train_timesteps: Number of training timesteps.
            seed: Seed of the weights.
        """
        channels, height, width = image_shape
        levels = len(block_out_channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = UNet2DModel(
                sample_size=(height, width),
                in_channels=channels,
                out_channels=channels,
                block_out_channels=tuple(block_out_channels),
                layers_per_block=layers_per_block,
                down_block_types=("DownBlock2D",) * levels,
                up_block_types=("UpBlock2D",) * levels,
                norm_num_groups=math.gcd(8, *block_out_channels),
                add_attention=False,
                num_class_embeds=None if num_classes is None else num_classes + 1,
            )
        scheduler = DDPMScheduler(
            num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule, prediction_type=prediction_type
        )
        return cls(unet, scheduler)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None for an unconditional model."""
        embeddings: int | None = self.unet.config.num_class_embeds
        return None if embeddings is None else embeddings - 1

    @property
    def null_label(self) -> int | None:
        """Label of no class: the one after the last class."""
        return self.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    def to(self, device: torch.device | str) -> PixelModel:
        """Move the UNet's weights; return this same model."""
        self.unet.to(device)
        return self

    def save(self, path: Path, *, replace: bool = False) -> None:
        """Write a diffusers pipeline folder atomically. UserError if ``path`` exists and not ``replace``."""
        with atomic_directory(path, replace=replace) as folder:
            DDPMPipeline(self.unet, self.scheduler).save_pretrained(folder, safe_serialization=True)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> PixelModel:
        """Read a diffusers pipeline folder.

        Raises:
            UserError: It is missing, incomplete, corrupt, of another kind, or has weights that are not finite.
        """
        _check_kind(path)
        try:
            unet, info = UNet2DModel.from_pretrained(
                path / "unet",
                use_safetensors=True,
                low_cpu_mem_usage=False,
                local_files_only=True,
                output_loading_info=True,
            )
            scheduler = DDPMScheduler.from_pretrained(path / "scheduler", local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"The model in {path} is incomplete or corrupt: {reason}") from error
        if info["missing_keys"] or info["mismatched_keys"]:
            raise UserError(f"The model in {path} is incomplete: its weights do not fill its UNet.")
        unet = unet.to(device)
        if (name := first_not_finite(unet.state_dict().items())) is not None:
            raise weights_not_finite(f"unet of {path}", name)
        return cls(unet, scheduler)


def _check_kind(path: Path) -> None:
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a diffusers model folder: it has no model_index.json.") from None
    except (OSError, ValueError):
        raise UserError(f"{path / 'model_index.json'} cannot be read: the model folder is damaged.") from None
    if index.get("unet") != ["diffusers", "UNet2DModel"]:
        raise UserError(f"{path} does not hold a UNet2DModel pipeline: only pixel-space models can be loaded.")
