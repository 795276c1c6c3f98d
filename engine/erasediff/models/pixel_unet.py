"""Pixel-space diffusion model: a UNet and its noise schedule, unconditional or class-conditional."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, diffusers_denoiser
from erasediff.errors import UserError
from erasediff.models import unet2d
from erasediff.models.checkpoint.base import Checkpoint, read_json
from erasediff.models.checkpoint.in_memory import InMemoryCheckpoint
from erasediff.models.checkpoint.opening import open_checkpoint
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.models.diffusion_model import Condition, Space, in_channels, mean_prediction
from erasediff.models.family import sides

CLASSES_FILE = "classes.json"
"""Names and null label of a saved model's classes, beside model_index.json; without it, classes are numbers and the
last embedding is the null label."""


class PixelModel(CheckpointModel):
    """Pixel-space UNet2DModel, unconditional or class-conditional, with the scheduler that it was trained with.

    With a null label, a conditional UNet has one embedding more than classes: the last is that of classifier-free
    guidance. A UNet that embeds labels like timesteps has none, and the classes of its data. Of one with a learned
    variance, the mean is trained.

    Attributes:
        names: Names of the classes; None where they are called by their numbers.
        has_null_label: Whether the last class embedding is the null label.
    """

    family = "ddpm"
    denoiser_component = "unet"
    denoiser_class = UNet2DModel
    autoencoder_component = None
    pipeline_class = DDPMPipeline
    other_pipelines: ClassVar = (DDIMPipeline,)
    flow = False
    default_guidance = 1.5
    subsets = unet2d.SUBSETS
    space: ClassVar[Space] = "pixel"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        empty: bool = False,
    ) -> None:
        super().__init__(checkpoint, dtype=dtype, device=device, empty=empty)
        self.names, self.has_null_label = self._classes()

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

        Raises:
            UserError: A side of the images cannot be halved at each level.
        """
        channels, height, width = image_shape
        levels = len(block_out_channels)
        multiple = 2 ** (levels - 1)
        if height % multiple or width % multiple:
            raise UserError(
                f"A UNet of {levels} levels takes images whose sides are multiples of {multiple}, not "
                f"{height}x{width}: set images.height and images.width, or model.block_out_channels of fewer levels."
            )
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
        return cls(InMemoryCheckpoint(DDPMPipeline.__name__, scheduler, unet=unet))

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", *, empty: bool = False) -> PixelModel:
        """Read the folder of a DDPMPipeline or DDIMPipeline, or of a UNet2DModel alone. Nothing is unpickled.

        Args:
            path: The folder.
            device: Device of the UNet.
            empty: As of ``CheckpointModel``.

        Raises:
            UserError: It is missing, incomplete, damaged, quantised, of another kind, of a kind of UNet2DModel that
                cannot be trained here, or has weights that are not finite.
        """
        checkpoint = open_checkpoint(path)
        pipelines = [pipeline.__name__ for pipeline in (cls.pipeline_class, *cls.other_pipelines)]
        if checkpoint.index.get("_class_name") not in pipelines:
            raise UserError(
                f"{path} is a {checkpoint.index.get('_class_name')}: of models in pixels, {' and '.join(pipelines)} "
                "can be loaded."
            )
        return cls(checkpoint, device=device, empty=empty)

    @classmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        return unet2d.dummy_inputs(config, batch_size, latent_size, dtype, device)

    def _check_components(self) -> None:
        super()._check_components()
        config = self._config
        unet2d.check_network(self.checkpoint.path, config)
        if config.in_channels not in (1, 3):
            raise UserError(
                f"The UNet in {self.checkpoint.path} has images of {config.in_channels} channels: only 1 and 3 can be "
                "read."
            )

    @property
    def _config(self) -> Any:
        return self.configs[self.denoiser_component]

    @property
    def unet(self) -> Any:
        """The denoiser, of any size and number of channels."""
        return self.denoiser

    @property
    def is_schedule_assumed(self) -> bool:
        """Whether the files had no scheduler, so that it is DDPM's own (Ho et al. 2020)."""
        return getattr(self.checkpoint, "is_schedule_assumed", False)

    @property
    def condition(self) -> Condition:
        return "class" if unet2d.is_class_conditional(self._config) else "none"

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null label not counted; None for an unconditional model, or before data tell."""
        embeddings = unet2d.num_embeddings(self._config)
        if embeddings is None:
            return None if self.names is None else len(self.names)
        return embeddings - self.has_null_label

    @property
    def null_label(self) -> int | None:
        """Label of no class: the one after the last class; None for a model without."""
        return self.num_classes if self.has_null_label else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, its number where it has none; () for an unconditional model."""
        return tuple(map(str, range(self.num_classes or 0))) if self.names is None else self.names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self._config.in_channels, *sides(self._config)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.image_shape

    @property
    def hash(self) -> str:
        return f"uint8 pixels, {self.image_shape[0]} channels"

    def encode_images(self, pixels: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] of float32 pixels [B, 3, H, W] in [-1, 1]: the same, or their grey values."""
        return as_uint8(pixels, self.image_shape[0])

    def decode_samples(self, samples: Tensor) -> Tensor:
        return samples.clamp(-1, 1)

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        return mean_prediction(diffusers_denoiser(model, noisy_sample, timesteps, condition), noisy_sample)

    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model with the class names of a data set, of which there may be one fewer than class embeddings.

        The last embedding is then the null label. The weights are shared.

        Raises:
            UserError: The data set has another number of classes.
        """
        if self.condition == "none":
            return self
        described = copy.copy(self)
        embeddings = unet2d.num_embeddings(self._config)
        if embeddings is None:
            described.names = class_names
            return described
        if len(class_names) not in (embeddings, embeddings - 1):
            raise UserError(
                f"The model has {embeddings} class embeddings, of which one may be the null label, but the data have "
                f"{len(class_names)} classes: give the data that it was trained on."
            )
        described.has_null_label = len(class_names) == embeddings - 1
        described.names = None if class_names == tuple(map(str, range(len(class_names)))) else class_names
        return described

    def _documents(self) -> Mapping[str, Mapping[str, Any]]:
        if self.names is None and (self.num_classes is None or self.has_null_label):
            return {}
        return {CLASSES_FILE: {"names": list(self.class_names), "null_label": self.null_label}}

    def _classes(self) -> tuple[tuple[str, ...] | None, bool]:
        """(names, whether there is a null label), as ``CLASSES_FILE`` says. UserError if it does not fit the UNet."""
        embeddings = unet2d.num_embeddings(self._config)
        file = self.checkpoint.path / CLASSES_FILE
        if self.condition == "none" or not file.exists():
            return None, embeddings is not None
        try:
            content = read_json(file)
        except UserError:
            content = {}
        names: Any = content.get("names")
        if isinstance(names, list) and not all(isinstance(name, str | int) for name in names):
            names = None
        null_label = content.get("null_label")
        if embeddings is None:
            fits = isinstance(names, list) and null_label is None
        else:
            fits = isinstance(names, list) and len(names) + (null_label is not None) == embeddings
        if not fits or null_label not in (None, (embeddings or 0) - 1):
            kind = f"{embeddings} class embeddings" if embeddings else "class embedding without a null label"
            raise UserError(f"{file} does not fit the {kind} of its model: correct or remove it.")
        names = tuple(map(str, names))
        is_numbered = embeddings is not None and names == tuple(map(str, range(len(names))))
        return (None if is_numbered else names), null_label is not None


def as_uint8(pixels: Tensor, channels: int) -> Tensor:
    """uint8 images [B, C, H, W] of float32 pixels [B, 3, H, W] in [-1, 1], in 3 channels or 1."""
    return ((in_channels(pixels, channels).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class PixelImages:
    """Encoder of images as they are, of whichever model: what a classifier is fitted to.

    Args:
        image_shape: (channels, height, width).
    """

    space: Space = "pixel"
    condition: Condition = "class"
    null_label: int | None = None

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape

    @property
    def hash(self) -> str:
        return f"uint8 pixels, {self.image_shape[0]} channels"

    def encode_images(self, pixels: Tensor) -> Tensor:
        return as_uint8(pixels, self.image_shape[0])
