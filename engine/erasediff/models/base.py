"""What the families share: encoders that come and go, addressed sampling, hashes, saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights, StoredTensor, fingerprint
from erasediff.models.checkpoint.base import Checkpoint, canonical_name, has, weighted_components
from erasediff.models.checkpoint.components import (
    check_component,
    load_component,
    load_scheduler,
    stored_weights,
)
from erasediff.models.checkpoint.save import STABILITY_AI, modelspec, save_folder, save_single_file
from erasediff_kernels import philox_bits, philox_noise

Layout = Literal["diffusers", "single-file"]


class TextToImageModel(Protocol):
    """A latent diffusion model with its text encoders, VAE and scheduler. One file per family implements it.

    family:          "sd" (1.x and 2.x), "sdxl", "sd3" or "flux"
    denoiser: the UNet or transformer, the only part that is trained
    process:         of the checkpoint's own scheduler, prediction type included
    latent_scale:    pixels per latent along one side
    size_multiple:   both sides of an image must be multiples of it
    default_size:    (height, width) in pixels that the checkpoint was trained for
    """

    @property
    def family(self) -> str: ...
    @property
    def denoiser(self) -> nn.Module: ...
    @property
    def process(self) -> Process: ...
    @property
    def original_layout(self) -> str | None:
        """The layout of the family's single files; None for a family without."""
        ...

    @property
    def denoiser_is_meta(self) -> bool:
        """Whether its weights are on the disk alone, and its parameters on the meta device."""
        ...

    def materialize_denoiser(self) -> nn.Module:
        """``denoiser``, or where that is empty, one with weights that lives as long as the caller holds it."""
        ...

    @property
    def denoiser_weights(self) -> LazyWeights:
        """The denoiser's weights as the checkpoint has them, in the dtype of the model, to be read one by one."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def latent_scale(self) -> int: ...
    @property
    def size_multiple(self) -> int: ...
    @property
    def default_size(self) -> tuple[int, int]: ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latent. UserError unless both sides are multiples of ``size_multiple``."""
        ...

    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """An ``objectives.Denoiser``: the prediction [B, C, h, w] in the dtype of ``model``.

        The condition is what ``encode_prompts`` and ``size_condition`` return; everything else that the network takes,
        such as positions and packing, is made inside.
        """
        ...

    def encode_images(self, pixels: Tensor, *, sample_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """Latents [B, C, h, w] float32, shifted and scaled as the denoiser expects, of ``pixels`` [B, 3, H, W].

        Pixels are in [-1, 1]. Without ``sample_ids`` the mean of the VAE's posterior; with them, int64 [B], a draw from
        it that is addressed by (seed, sample id).
        """
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] float32 in [-1, 1] of ``latents`` [B, C, h, w]: the inverse of ``encode_images``."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt: tensors [N, ...] in the encoders' dtype, on the model's device.

        The empty prompt is the null condition of classifier-free guidance, as the checkpoint's pipeline makes it.
        """
        ...

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        """``{"time_ids": [count, 6]}`` for SDXL, from (height, width), (top, left), (height, width); {} elsewhere."""
        ...

    def release_encoders(self) -> None:
        """Text encoders and VAE leave memory until they are next needed; ``hash`` stays."""
        ...

    def restore_encoders(self) -> None:
        """Loads text encoders and VAE now; whatever needs them does so by itself."""
        ...

    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        num_inference_steps: int = 30,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """uint8 images [N, H, W, 3] on the host, one per prompt, by the checkpoint's diffusers pipeline and scheduler.

        The noise of image i, a stochastic sampler's included, is addressed by (seed, i): neither the batch size nor the
        other prompts change it. ``guidance_scale`` None is the family's usual one; ``progress`` is called with the
        number of images after each batch.
        """
        ...

    @property
    def hash(self) -> str:
        """SHA-256 over encoders and VAE: what a cache of latents and embeddings depends on."""
        ...

    def denoiser_hash(self) -> str:
        """SHA-256 over the denoiser's weights as they are now."""
        ...

    def save(
        self,
        path: Path,
        *,
        layout: Layout = "diffusers",
        dtype: torch.dtype | None = None,
        max_shard_size: int = 10_000_000_000,
        replace: bool = False,
    ) -> None:
        """Write the whole checkpoint, atomically: a diffusers folder, or one file in the original layout (sd, sdxl).

        ``dtype`` None keeps each tensor's stored dtype; every tensor that was not trained then has the input's bits.
        ``max_shard_size`` is in bytes, for the folder. UserError for a family without that layout, for a ``path``
        that exists unless ``replace``, and for what the disk refuses.
        """
        ...


INITIAL_NOISE, SAMPLER_SEED, POSTERIOR_NOISE = range(3)
"""The step in the Philox address of draws that belong to no training step."""


class LatentModel(ABC):
    """Base of the families: all of ``TextToImageModel`` but what a network and its text encoders are called with.

    family:             the word for the family
    denoiser_component: "unet" or "transformer", as in model_index.json
    text_encoders:      all that the family has; of these, the ``optional_encoders`` may be left out
    pipeline_class:     the diffusers pipeline that samples
    flow:               whether it is trained by flow matching
    usual_guidance:     guidance scale of a sample that asks for none

    empty: the denoiser has no weights yet (its parameters are on the meta device): who shards it fills it

    Raises ``UserError`` for a checkpoint that is incomplete, damaged or whose parts do not fit each other, before any
    weight is read.
    """

    family: ClassVar[str]
    denoiser_component: ClassVar[str]
    text_encoders: ClassVar[tuple[str, ...]]
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    pipeline_class: ClassVar[Any]
    flow: ClassVar[bool]
    default_guidance: ClassVar[float]

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, empty: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.encoder_names = [
            name for name in self.text_encoders if name not in self.optional_encoders or has(checkpoint, name)
        ]
        self.configs: dict[str, Any] = {
            name: check_component(checkpoint, name).config
            for name in (self.denoiser_component, "vae", *self.encoder_names)
        }
        for name in weighted_components(checkpoint):
            # Also those that only a save will read: it must not fail when the work is done.
            checkpoint.tensors(name)
        self.scheduler = load_scheduler(checkpoint, flow=self.flow)
        self.process = Process.from_scheduler(self.scheduler)
        for what, size, whose, expected in self._widths():
            if size != expected:
                raise UserError(
                    f"The parts of {checkpoint.path} do not fit together: {what} is {size}, but {whose} is {expected}."
                )
        self.tokenizers = {
            name: checkpoint.tokenizer(name)
            for name in (encoder.replace("text_encoder", "tokenizer") for encoder in self.encoder_names)
        }
        self._encoders: dict[str, nn.Module] | None = None
        self.denoiser = self._empty_denoiser()
        if not empty:
            self.denoiser = self.materialize_denoiser()

    @abstractmethod
    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        """(what, its size, of whom, its size) that must agree between components for them to be one model."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor: ...

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]: ...

    def _empty_denoiser(self) -> nn.Module:
        module = check_component(self.checkpoint, self.denoiser_component)
        # diffusers' own ``to`` warns of modules kept in float32 even where there are none.
        return nn.Module.to(module, self.dtype).eval()

    def materialize_denoiser(self) -> nn.Module:
        if not self.denoiser_is_meta:
            return self.denoiser
        return load_component(self.checkpoint, self.denoiser_component, self.dtype, self.device)

    @property
    def denoiser_weights(self) -> LazyWeights:
        module = check_component(self.checkpoint, self.denoiser_component)
        return stored_weights(self.checkpoint, self.denoiser_component, module, self.dtype)

    @property
    def denoiser_is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.denoiser.parameters())

    @property
    def latent_scale(self) -> int:
        scale: int = 2 ** (len(self.configs["vae"].block_out_channels) - 1)
        return scale

    @property
    def size_multiple(self) -> int:
        return self.latent_scale

    @property
    def default_size(self) -> tuple[int, int]:
        size: int = self.configs[self.denoiser_component].sample_size * self.latent_scale
        return size, size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.size_multiple
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise UserError(f"An image of {height}x{width} does not fit this model: give multiples of {multiple}.")
        channels: int = self.configs["vae"].latent_channels
        return channels, height // self.latent_scale, width // self.latent_scale

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, *, sample_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        vae: Any = self.encoders["vae"]
        posterior = vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        latents: Tensor = posterior.mean
        if sample_ids is not None:
            key = noise_key(seed, POSTERIOR_NOISE, self.device)
            ids = sample_ids.to(self.device)
            latents = latents + posterior.std * philox_noise(ids, key, int(NoiseRole.SAMPLING), latents.shape[1:])
        scaled: Tensor = (latents - self._shift) * vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae: Any = self.encoders["vae"]
        latents = latents.to(self.device, torch.float32) / vae.config.scaling_factor + self._shift
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels.clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return self.configs["vae"].get("shift_factor") or 0.0

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        return {}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The VAE, in float32 since SDXL's overflows in half precision, and the text encoders; read when needed."""
        if self._encoders is None:
            self._encoders = {}
            for name in ("vae", *self.encoder_names):
                dtype = torch.float32 if name == "vae" else self.dtype
                module = load_component(self.checkpoint, name, dtype, self.device)
                self._encoders[name] = module.requires_grad_(False)
        return self._encoders

    def release_encoders(self) -> None:
        self._encoders = None

    def restore_encoders(self) -> None:
        _ = self.encoders

    def _pipeline(self, denoiser: nn.Module | None = None) -> Any:
        """The diffusers pipeline of these components, without a safety checker, which would black out measurements."""
        settings = {name: value for name, value in self.checkpoint.index.items() if isinstance(value, bool)}
        settings["requires_safety_checker"] = False
        components = {
            **dict.fromkeys(self.optional_encoders),
            **dict.fromkeys(name.replace("text_encoder", "tokenizer") for name in self.optional_encoders),
            **self.encoders,
            **self.tokenizers,
            self.denoiser_component: self.denoiser if denoiser is None else denoiser,
            "scheduler": type(self.scheduler).from_config(self.scheduler.config),
        }
        parameters = signature(self.pipeline_class.__init__).parameters
        chosen = {name: value for name, value in settings.items() if name in parameters}
        absent = dict.fromkeys({"safety_checker", "feature_extractor"} & set(parameters))
        pipeline = self.pipeline_class(**components, **chosen, **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        num_inference_steps: int = 30,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        batch_size: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        height, width = height or self.default_size[0], width or self.default_size[1]
        shape = self.latent_shape(height, width)
        denoiser = self.materialize_denoiser()
        pipeline = self._pipeline(denoiser)
        was_training = denoiser.training
        denoiser.eval()
        images = [torch.empty(0, height, width, 3, dtype=torch.uint8)]
        for first in range(0, len(prompts), batch_size):
            ids = torch.arange(first, min(first + batch_size, len(prompts)))
            noise = philox_noise(ids, noise_key(seed, INITIAL_NOISE, "cpu"), int(NoiseRole.SAMPLING), shape)
            latents = pipeline(
                prompt=[prompts[i] for i in ids.tolist()],
                guidance_scale=self.default_guidance if guidance_scale is None else guidance_scale,
                num_inference_steps=num_inference_steps,
                height=height,
                width=width,
                latents=self._packed(noise.to(self.device, self.dtype)),
                generator=_generators(ids, seed),
                output_type="latent",
                **self._negative(negative_prompt, len(ids)),
                **self._text_length(),
            ).images
            pixels = self.decode_latents(self._unpacked(latents, shape))
            images.append(((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().to("cpu", torch.uint8))
            if progress is not None:
                progress(len(ids))
        denoiser.train(was_training)
        return torch.cat(images)

    def _negative(self, prompt: str, count: int) -> dict[str, Any]:
        # Left out when empty: the pipeline then takes the checkpoint's own null condition.
        return {"negative_prompt": [prompt] * count} if prompt else {}

    def _text_length(self) -> dict[str, Any]:
        """What the pipeline's calls must be told of the length of prompts, so that all see the same tokens."""
        return {}

    def _packed(self, latents: Tensor) -> Tensor:
        """``latents`` [B, C, h, w] as the pipeline and the network take them."""
        return latents

    def _unpacked(self, latents: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The inverse of ``_packed``."""
        return latents

    @cached_property
    def hash(self) -> str:
        vae = self.configs["vae"]
        tokenizers = [(tokenizer.pad_token, tokenizer.model_max_length) for tokenizer in self.tokenizers.values()]
        modules = [check_component(self.checkpoint, name) for name in self.encoder_names]
        described = (str(self.dtype), vae.scaling_factor, self._shift, tokenizers, modules)
        return fingerprint(described, self._stored_encoders())

    def _stored_encoders(self) -> Iterator[tuple[str, Tensor]]:
        for component in ("vae", *self.encoder_names):
            stored = self.checkpoint.tensors(component)
            for name, tensor in sorted(((canonical_name(n), t) for n, t in stored.items()), key=lambda item: item[0]):
                yield f"{component}.{name}", tensor.load()

    def denoiser_hash(self) -> str:
        weights = self.denoiser_weights if self.denoiser_is_meta else {}
        named = sorted(self.denoiser.state_dict().items())
        return fingerprint(
            self.denoiser_component, ((name, weights[name]() if tensor.is_meta else tensor) for name, tensor in named)
        )

    def save(
        self,
        path: Path,
        *,
        layout: Layout = "diffusers",
        dtype: torch.dtype | None = None,
        max_shard_size: int = 10_000_000_000,
        replace: bool = False,
    ) -> None:
        if path.resolve() == self.checkpoint.path.resolve():
            raise UserError(f"{path} is where the model came from, and is still read from: save it under another name.")
        metadata = modelspec(
            self.checkpoint.metadata,
            architecture=self.architecture,
            implementation="diffusers" if layout == "diffusers" else STABILITY_AI,
            prediction_type=self.process.prediction_type,
            size=self.default_size,
        )
        trained = {self.denoiser_component: self.denoiser.state_dict()}
        if layout == "diffusers":
            save_folder(
                self.checkpoint,
                path,
                trained=trained,
                metadata=metadata,
                dtype=dtype,
                max_shard_size=max_shard_size,
                replace=replace,
            )
            return
        if self.original_layout is None:
            raise UserError(f"A {self.family} model has no single-file layout here: save it as a diffusers folder.")
        save_single_file(
            self.checkpoint,
            path,
            layout=self.original_layout,
            trained=trained,
            metadata=metadata,
            dtype=dtype,
            markers=self._markers(),
            replace=replace,
        )

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As ModelSpec names it."""

    @property
    def original_layout(self) -> str | None:
        """The layout of the family's single files, of ``original_layout.LAYOUTS``; None for a family without."""
        return None

    def _markers(self) -> dict[str, StoredTensor]:
        """Entries of a single file that are no weights but tell other tools how to sample."""
        return {}


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of its first weight."""
    return next(model.parameters()).dtype


def _generators(ids: Tensor, seed: int) -> list[torch.Generator]:
    """For samplers that draw noise at every step: one generator per image, on the host so that devices agree."""
    words = philox_bits(ids, noise_key(seed, SAMPLER_SEED, "cpu"), int(NoiseRole.SAMPLING), 1)[:, 0]
    return [torch.Generator().manual_seed(word) for word in words.tolist()]
