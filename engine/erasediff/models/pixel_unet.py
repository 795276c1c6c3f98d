"""Pixel-space diffusion model: a UNet and its noise schedule, unconditional or class-conditional."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, diffusers_denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_directory
from erasediff.models.checkpoint.base import canonical_name, component_files
from erasediff.models.diffusion_model import Condition, Space
from erasediff.utils.finite import first_not_finite, weights_not_finite

PIPELINES = {"DDPMPipeline": DDPMPipeline, "DDIMPipeline": DDIMPipeline}
CLASSES_FILE = "classes.json"
"""Names and null label of a saved model's classes, beside model_index.json; without it, classes are numbers and the
last embedding is the null label."""
LUMA = (0.299, 0.587, 0.114)
"""Grey value of R, G and B (ITU-R BT.601)."""


@dataclass(frozen=True, slots=True)
class PixelModel:
    """Pixel-space UNet2DModel, unconditional or class-conditional, with the scheduler that it was trained with.

    With a null label, a conditional UNet has one embedding more than classes: the last is that of classifier-free
    guidance.

    Attributes:
        unet: The denoiser, of any size and number of channels.
        scheduler: A scheduler of diffusers with ``alphas_cumprod``.
        pipeline_class: The diffusers pipeline that the model is saved as.
        names: Names of the classes; None where they are called by their numbers.
        has_null_label: Whether the last class embedding is the null label.
        dtypes: Dtypes of the weights on the disk, by name, in which they are saved again; float32 for all others.
        is_schedule_assumed: Whether the files had no scheduler, so that it is DDPM's own (Ho et al. 2020).
    """

    unet: UNet2DModel
    scheduler: Any
    pipeline_class: Any = DDPMPipeline
    names: tuple[str, ...] | None = None
    has_null_label: bool = True
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    is_schedule_assumed: bool = False
    space: ClassVar[Space] = "pixel"

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
        return cls(unet, scheduler)

    @property
    def condition(self) -> Condition:
        return "none" if self.num_classes is None else "class"

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null label not counted; None for an unconditional model."""
        embeddings: int | None = self.unet.config.num_class_embeds
        return None if embeddings is None else embeddings - self.has_null_label

    @property
    def null_label(self) -> int | None:
        """Label of no class: the one after the last class; None for a model without."""
        return self.num_classes if self.has_null_label else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, its number where it has none; () for an unconditional model."""
        return tuple(map(str, range(self.num_classes or 0))) if self.names is None else self.names

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.unet
        return unet

    @property
    def process(self) -> Process:
        return Process.from_scheduler(self.scheduler)

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

    @property
    def hash(self) -> str:
        return f"uint8 pixels, {self.image_shape[0]} channels"

    def encode_images(self, pixels: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] of float32 pixels [B, 3, H, W] in [-1, 1]: the same, or their grey values."""
        if self.image_shape[0] == 1:
            pixels = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(LUMA))[:, None]
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        return diffusers_denoiser(model, noisy_sample, timesteps, condition)

    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model with the class names of a data set, of which there may be one fewer than class embeddings.

        The last embedding is then the null label. The weights are shared.

        Raises:
            UserError: The data set has another number of classes.
        """
        embeddings: int | None = self.unet.config.num_class_embeds
        if embeddings is None:
            return self
        if len(class_names) not in (embeddings, embeddings - 1):
            raise UserError(
                f"The model has {embeddings} class embeddings, of which one may be the null label, but the data have "
                f"{len(class_names)} classes: give the data that it was trained on."
            )
        has_null_label = len(class_names) == embeddings - 1
        names = None if class_names == tuple(map(str, range(len(class_names)))) else class_names
        return replace(self, names=names, has_null_label=has_null_label)

    def to(self, device: torch.device | str) -> Self:
        """Move the UNet's weights; return this same model."""
        self.unet.to(device)
        return self

    def save(self, path: Path, *, replace: bool = False) -> None:
        """Write a diffusers pipeline folder atomically. UserError if ``path`` exists and not ``replace``."""
        with atomic_directory(path, replace=replace) as folder:
            pipeline = self.pipeline_class(self._in_stored_dtypes(), self.scheduler)
            pipeline.save_pretrained(folder, safe_serialization=True)
            if self.names is not None or (self.num_classes is not None and not self.has_null_label):
                content = {"names": list(self.class_names), "null_label": self.null_label}
                (folder / CLASSES_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _in_stored_dtypes(self) -> UNet2DModel:
        if not self.dtypes:
            return self.unet
        unet = copy.deepcopy(self.unet)
        for name, parameter in unet.named_parameters():
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
        return unet

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> PixelModel:
        """Read the folder of a DDPMPipeline or DDIMPipeline, or of a UNet2DModel alone. Nothing is unpickled.

        Raises:
            UserError: It is missing, incomplete, corrupt, of another kind, of a kind of UNet2DModel that cannot be
                trained here, or has weights that are not finite.
        """
        pipeline = _pipeline_of(path)
        folder = path / "unet" if (path / "unet").is_dir() else path
        try:
            files = component_files(folder)
            unet, info = UNet2DModel.from_pretrained(
                folder,
                variant=_variant(files[0].path),
                use_safetensors=True,
                low_cpu_mem_usage=False,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=torch.float32,
            )
        except (UserError, OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"The model in {path} is incomplete or corrupt: {reason}") from error
        if info["missing_keys"] or info["mismatched_keys"]:
            raise UserError(f"The model in {path} is incomplete: its weights do not fill its UNet.")
        unet = unet.to(device)
        if (name := first_not_finite(unet.state_dict().items())) is not None:
            raise weights_not_finite(f"unet of {path}", name)
        _check_network(path, unet.config)
        stored = {canonical_name(name): tensor.dtype for file in files for name, tensor in file.tensors.items()}
        scheduler, is_assumed = _scheduler(path)
        names, has_null_label = _classes(path, unet.config.num_class_embeds)
        return cls(
            unet,
            scheduler,
            pipeline_class=pipeline,
            names=names,
            has_null_label=has_null_label,
            dtypes={name: dtype for name, dtype in stored.items() if dtype != torch.float32},
            is_schedule_assumed=is_assumed,
        )


def is_pixel_model(path: Path) -> bool:
    """Return true for the folder of a pipeline whose denoiser is a UNet2DModel, or of a UNet2DModel alone."""
    index = _json_or_none(path / "model_index.json")
    if index is None:
        config = _json_or_none(path / "config.json")
        return config is not None and config.get("_class_name") == UNet2DModel.__name__
    return index.get("unet") == ["diffusers", UNet2DModel.__name__] and "vqvae" not in index


def _json_or_none(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _pipeline_of(path: Path) -> Any:
    """The pipeline class of a folder, DDPMPipeline for a network alone. UserError for another kind of model."""
    if not (path / "model_index.json").exists() and is_pixel_model(path):
        if (path.parent / "model_index.json").exists():
            raise UserError(f"{path} is one component of a model, not the model: give the folder above it.")
        return DDPMPipeline
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not a diffusers model folder: it has no model_index.json.") from None
    except (OSError, ValueError):
        raise UserError(f"{path / 'model_index.json'} cannot be read: the model folder is damaged.") from None
    if index.get("unet") != ["diffusers", UNet2DModel.__name__]:
        raise UserError(f"{path} does not hold a UNet2DModel pipeline: only pixel-space models can be loaded.")
    name = index.get("_class_name", "DDPMPipeline")
    if name not in PIPELINES:
        raise UserError(f"{path} is a {name}: of models in pixels, {' and '.join(PIPELINES)} can be loaded.")
    return PIPELINES[name]


def _variant(file: Path) -> str | None:
    """Variant of a weight file, such as "fp16" for ``diffusion_pytorch_model.fp16.safetensors`` and its shards."""
    parts = file.name.split(".")
    return re.sub(r"-\d+-of-\d+$", "", parts[1]) if len(parts) == 3 else None


def _check_network(path: Path, config: Any) -> None:
    if config.class_embed_type is not None:
        raise UserError(
            f"The UNet in {path} embeds its classes by class_embed_type {config.class_embed_type!r}, which does not "
            "say which classes there are: only labels with an embedding each (num_class_embeds) can be unlearned."
        )
    if config.in_channels not in (1, 3):
        raise UserError(f"The UNet in {path} has images of {config.in_channels} channels: only 1 and 3 can be read.")
    if config.out_channels != config.in_channels:
        raise UserError(
            f"The UNet in {path} predicts {config.out_channels} channels of {config.in_channels}-channel images, as "
            "with a learned variance, which cannot be trained here."
        )
    if config.sample_size is None:
        raise UserError(f"The UNet in {path} does not say its size: write sample_size into its config.json.")


def _scheduler(path: Path) -> tuple[Any, bool]:
    """(scheduler, whether it is assumed). UserError for one that is damaged, or without ``alphas_cumprod``."""
    folder = path / "scheduler" if (path / "scheduler").is_dir() else path
    file = folder / "scheduler_config.json"
    if not file.exists() and not (path / "model_index.json").exists():
        return DDPMScheduler(), True
    name = (_json_or_none(file) or {}).get("_class_name", DDPMScheduler.__name__)
    scheduler_class: Any = getattr(diffusers, str(name), None)
    if not hasattr(scheduler_class, "from_pretrained"):
        raise UserError(f"The scheduler in {path} is a {name}, which diffusers does not have.")
    try:
        scheduler = scheduler_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The model in {path} is incomplete or corrupt: {reason}") from error
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise UserError(f"The scheduler in {path} is a {name}, which has no alphas_cumprod to train on.")
    return scheduler, False


def _classes(path: Path, embeddings: int | None) -> tuple[tuple[str, ...] | None, bool]:
    """(names, whether there is a null label), as ``CLASSES_FILE`` says. UserError if it does not fit the network."""
    file = path / CLASSES_FILE
    if embeddings is None or not file.exists():
        return None, True
    content = _json_or_none(file) or {}
    names: Any = content.get("names")
    null_label = content.get("null_label")
    fits = isinstance(names, list) and len(names) + (null_label is not None) == embeddings
    if not fits or null_label not in (None, embeddings - 1):
        raise UserError(f"{file} does not fit the {embeddings} class embeddings of its model: correct or remove it.")
    names = tuple(map(str, names))
    return (None if names == tuple(map(str, range(len(names)))) else names), null_label is not None
