"""Model family: what loading, training, LoRA files and planning know of it without a checkpoint; the registry."""

from __future__ import annotations

import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

import erasediff.models
from erasediff.errors import UserError
from erasediff.models.diffusion_model import Space

if TYPE_CHECKING:
    from erasediff.models.checkpoint.original_layout import Place
    from erasediff.models.checkpoint_model import CheckpointModel


@dataclass(frozen=True, slots=True)
class Subsets:
    """Locations of the named selections of ``trainable.select``: parts of parameters' names, between their dots.

    Attributes:
        cross_attention: Parts that only cross-attention's names have.
        self_attention: Parts that self-attention's names have; what is cross-attention is not self-attention.
        keys_and_values: The projections of keys and values.
        outermost: Beginnings of the names of the outermost layers and the embedding of time.
        embeddings: Parts that only the names of embeddings of time and class within blocks have.
    """

    cross_attention: frozenset[str]
    self_attention: frozenset[str]
    keys_and_values: frozenset[str]
    outermost: tuple[str, ...]
    embeddings: frozenset[str] = frozenset()


_OUTERMOST = (
    *("conv_norm_out.", "conv_out.", "norm_out.", "proj_out."),
    *("time_embedding.", "add_embedding.", "time_text_embed."),
)
UNET_SUBSETS = Subsets(frozenset({"attn2"}), frozenset({"attn1"}), frozenset({"to_k", "to_v"}), _OUTERMOST)
JOINT_SUBSETS = Subsets(
    frozenset({"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}),
    frozenset({"attn", "attn2"}),
    frozenset({"to_k", "to_v", "add_k_proj", "add_v_proj"}),
    _OUTERMOST,
)
"""Of joint attention (SD3, FLUX): the text's own projections are taken for cross-attention, the others for self."""


class ModelFamily(ABC):
    """A family of diffusion models, of which ``CheckpointModel`` is the loaded one.

    A new family is a concrete subclass of ``CheckpointModel`` in a module of ``erasediff.models``, where ``families``
    finds it: of ``LatentModel`` with prompts, of ``UnpromptedLatentModel`` in latents without.

    Attributes:
        family: The family's name: "sd" (1.x and 2.x), "sdxl", "sd3", "flux"; "ddpm" (pixels), "dit", "ldm".
        denoiser_component: "unet" or "transformer", as in model_index.json; also the prefix of diffusers' LoRA keys.
        denoiser_class: The network's class in diffusers.
        autoencoder_component: As in model_index.json; None for a model of pixels.
        text_encoders: All that the family has, none without prompts; the ``optional_encoders`` may be left out.
        pipeline_class: The diffusers pipeline that samples, by whose name a checkpoint is known.
        other_pipelines: Pipelines of the same components, by whose names a checkpoint is known too.
        flow: Whether the network is trained by flow matching, which its scheduler then must be for.
        default_guidance: Guidance scale of a sample that asks for none.
        subsets: Where the named selections of ``trainable.select`` lie in the network.
        space: Whether samples are images themselves or latents.
        reference_configs: The network's configuration and default resolution in pixels, by the names that planning
            knows without a checkpoint.
    """

    family: ClassVar[str]
    denoiser_component: ClassVar[str]
    denoiser_class: ClassVar[Any]
    autoencoder_component: ClassVar[str | None]
    text_encoders: ClassVar[tuple[str, ...]] = ()
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    pipeline_class: ClassVar[Any]
    other_pipelines: ClassVar[tuple[Any, ...]] = ()
    flow: ClassVar[bool]
    default_guidance: ClassVar[float]
    subsets: ClassVar[Subsets] = UNET_SUBSETS
    space: ClassVar[Space] = "latent"
    reference_configs: ClassVar[Mapping[str, tuple[dict[str, Any], int]]] = {}

    @classmethod
    def has_denoiser(cls, class_name: str, config: Any) -> bool:
        """Whether a diffusers network of this class and configuration is one of the family's."""
        return bool(class_name == cls.denoiser_class.__name__)

    @classmethod
    def default_latent_size(cls, config: Any) -> tuple[int, int]:
        """(height, width) in latents that a network was trained for, by its configuration.

        Raises:
            UserError: The configuration does not say.
        """
        return sides(config)

    @classmethod
    @abstractmethod
    def dummy_inputs(
        cls, config: Any, batch_size: int, latent_size: tuple[int, int], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Any]:
        """Keyword arguments of the network's forward but the timestep, for planning: zeros of the right shapes.

        Args:
            config: The network's.
            batch_size: The leading size of every tensor that has one for each sample.
            latent_size: (height, width) in latents.
            dtype: Of all floating-point inputs.
            device: Of all tensors.
        """

    @classmethod
    def original_place(cls, name: str, config: Any) -> Place | None:
        """The place of a weight of the network, by its name here, in the original layout; None for one without."""
        return None

    @classmethod
    def kohya_name(cls, name: str, module: nn.Module) -> str | None:
        """A layer's name in kohya's LoRA files, with its dots; None for a family without."""
        return None


def vae_scale(config: Any) -> int:
    """Pixels per latent along one side, by a VAE's configuration."""
    scale: int = 2 ** (len(config["block_out_channels"]) - 1)
    return scale


def sides(config: Any) -> tuple[int, int]:
    """(height, width) of a network's samples: ``sample_size`` of its configuration, a number or a pair.

    Raises:
        UserError: The configuration does not say.
    """
    size = config.get("sample_size")
    if size is None:
        raise UserError("The network's configuration does not say for which size it was trained: give a resolution.")
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def families() -> dict[str, type[CheckpointModel]]:
    """The families by name: the concrete subclasses of ``CheckpointModel`` in the modules of ``erasediff.models``."""
    from erasediff.models.checkpoint_model import CheckpointModel

    classes: dict[str, type[CheckpointModel]] = {}
    for entry in pkgutil.iter_modules(erasediff.models.__path__):
        module = import_module(f"{erasediff.models.__name__}.{entry.name}")
        for cls in vars(module).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, CheckpointModel)
                and not inspect.isabstract(cls)
                and cls.__module__ == module.__name__
            ):
                classes[cls.family] = cls
    return classes


def family_named(family: str) -> type[CheckpointModel]:
    """The family called ``family``. ValueError if there is none."""
    classes = families()
    if family not in classes:
        raise ValueError(f"there is no model family {family!r}: give one of {', '.join(classes)}")
    return classes[family]


def known_family(pipeline: str | None) -> type[CheckpointModel] | None:
    """The family whose diffusers pipeline is called ``pipeline``; None for that of no family."""
    return _by_pipeline().get(pipeline or "")


def family_of_pipeline(pipeline: str | None, source: object) -> type[CheckpointModel]:
    """The family whose diffusers pipeline is called ``pipeline``, "_class_name" in the model_index.json of ``source``.

    Raises:
        UserError: No family has such a pipeline.
    """
    pipelines = _by_pipeline()
    if pipeline not in pipelines:
        raise UserError(
            f"{source} is a {pipeline}, which is not among the families known here: {', '.join(pipelines)}."
        )
    return pipelines[pipeline]


def _by_pipeline() -> dict[str, type[CheckpointModel]]:
    return {
        pipeline.__name__: cls for cls in families().values() for pipeline in (cls.pipeline_class, *cls.other_pipelines)
    }


def family_of_denoiser(module: nn.Module) -> type[CheckpointModel] | None:
    """The family whose denoiser ``module`` is; None for one of no family."""
    config: Any = getattr(module, "config", None)
    return next((cls for cls in families().values() if cls.has_denoiser(type(module).__name__, config)), None)
