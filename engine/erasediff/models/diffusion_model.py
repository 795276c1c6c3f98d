"""Interface of a diffusion model: a denoiser, a process, a space and a kind of condition."""

from __future__ import annotations

from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process

Space = Literal["pixel", "latent"]
"""Of a model's samples: images themselves, or latents of an autoencoder."""
Condition = Literal["none", "class", "text"]
"""What a denoiser is told besides the timestep: nothing, a class label, or prompts."""


class SampleEncoder(Protocol):
    """What turns images into the samples of a model without prompts."""

    @property
    def space(self) -> Space: ...

    @property
    def condition(self) -> Condition: ...

    @property
    def null_label(self) -> int | None:
        """Label of no class, for classifier-free guidance; None for a model without."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image in pixels."""

    @property
    def hash(self) -> str:
        """Hash of all that ``encode_images`` depends on."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Samples [B, ...] to be cached, of float32 pixels [B, 3, H, W] in [-1, 1].

        uint8 stands for [-1, 1] in steps of 1/127.5, which ``CachedBatches`` undoes.
        """


class UnpromptedModel(SampleEncoder, Protocol):
    """A model without prompts: unconditional, or conditioned on class labels, in pixels or in latents.

    The members that are not listed here are those of ``CheckpointModel``, which models with prompts have too. A batch
    has the entries ``"sample"`` and, if the model is conditioned on classes, ``"class_labels"``.
    """

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null label not counted; None where there are none, or only data can tell."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class; () for an unconditional model."""

    @property
    def denoiser(self) -> nn.Module: ...

    @property
    def process(self) -> Process: ...

    @property
    def scheduler(self) -> Any:
        """The checkpoint's scheduler of diffusers."""

    @property
    def default_guidance(self) -> float: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a sample: ``image_shape``, or that of the image's latents."""

    def decode_samples(self, samples: Tensor) -> Tensor:
        """Images [B, C, H, W] float32 in [-1, 1] of samples [B, ...]."""

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """The prediction of ``model``, this denoiser or a copy of it; a ``diffusion.batch.Denoiser``."""

    def described_by(self, class_names: tuple[str, ...]) -> Self:
        """This model with the classes of a data set. UserError for classes that the model does not have."""

    def to(self, device: torch.device | str) -> Self:
        """Move the denoiser's weights; return this same model."""


def mean_prediction(prediction: Tensor, sample: Tensor) -> Tensor:
    """The first C channels of a prediction [B, C or 2C, ...] of samples [B, C, ...].

    The others are a learned variance (Nichol & Dhariwal 2021), which its own loss trains and nothing here changes but
    through layers that both share.
    """
    channels = sample.shape[1]
    return prediction if prediction.shape[1] == channels else prediction[:, :channels]


LUMA = (0.299, 0.587, 0.114)
"""Grey value of R, G and B (ITU-R BT.601)."""


def in_channels(pixels: Tensor, channels: int) -> Tensor:
    """Pixels [B, 3, H, W] as images of 3 channels, or their grey values [B, 1, H, W]."""
    if channels == 3:
        return pixels
    return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(LUMA))[:, None]
