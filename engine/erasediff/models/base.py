"""Text-to-image model: base class of the families (encoders, latents, hashes, saving)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights, fingerprint
from erasediff.models.checkpoint.base import Checkpoint, canonical_name, has, weighted_components
from erasediff.models.checkpoint.changed import ChangedCheckpoint, Changes
from erasediff.models.checkpoint.components import (
    check_component,
    fill_component,
    load_component,
    load_scheduler,
    stored_weights,
)
from erasediff.models.checkpoint.recorded_config import prediction_markers
from erasediff.models.checkpoint.save import STABILITY_AI, modelspec, save_folder, save_single_file
from erasediff.models.family import ModelFamily, vae_scale
from erasediff.models.latent_statistics import latent_statistics
from erasediff.models.pipeline import POSTERIOR_NOISE, sample_images
from erasediff.models.weight_update import SavedDtype, WeightUpdate, measure_update
from erasediff.utils.finite import finite_weight
from erasediff_kernels import philox_noise

Layout = Literal["diffusers", "single-file"]


class LatentModel(ModelFamily):
    """A latent diffusion model with its text encoders, VAE and scheduler.

    Attributes:
        denoiser: The UNet or transformer, the only part that is trained.
        denoiser_weights: The denoiser's weights as the checkpoint has them, in ``dtype``, to be read one by one.
        process: Of the checkpoint's own scheduler, prediction type included.
        dtype: Of denoiser and text encoders; the VAE is float32.
        device: Of all parts.

    Args:
        checkpoint: What the parts are read from.
        dtype: Of denoiser and text encoders.
        device: Of all parts.
        empty: Leave the denoiser's parameters on the meta device, for a caller who shards and fills it.

    Raises:
        UserError: The checkpoint is incomplete, damaged, or its parts do not fit each other; before any weight is read.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, empty: bool = False
    ) -> None:
        self.checkpoint: Checkpoint = checkpoint
        self.dtype = dtype
        self.device = torch.device(device)
        self.encoder_names = [
            name for name in self.text_encoders if name not in self.optional_encoders or has(checkpoint, name)
        ]
        modules = {
            name: check_component(checkpoint, name) for name in (self.denoiser_component, "vae", *self.encoder_names)
        }
        self.configs: dict[str, Any] = {name: module.config for name, module in modules.items()}
        for name in weighted_components(checkpoint):
            # Also those that only a save will read: it must not fail when the work is done.
            checkpoint.tensors(name)
        self.scheduler = load_scheduler(checkpoint, flow=self.flow)
        self.process = Process.from_scheduler(self.scheduler)
        for part, size, other, expected in self._widths():
            if size != expected:
                raise UserError(
                    f"The parts of {checkpoint.path} do not fit together: {part} is {size}, but {other} is {expected}."
                )
        self.tokenizers = {
            name: checkpoint.tokenizer(name)
            for name in (encoder.replace("text_encoder", "tokenizer") for encoder in self.encoder_names)
        }
        self._encoders: dict[str, nn.Module] | None = None
        denoiser = modules[self.denoiser_component]
        self.denoiser_weights: LazyWeights = stored_weights(checkpoint, self.denoiser_component, denoiser, dtype)
        if empty:
            # diffusers' own ``to`` warns of modules kept in float32 even where there are none.
            self.denoiser = nn.Module.to(denoiser, dtype).eval()
        else:
            self.denoiser = fill_component(denoiser, self.denoiser_weights, self.device)

    @abstractmethod
    def _widths(self) -> Iterable[tuple[str, int, str, int]]:
        """(part, size, other part, size) that must agree between components for them to be one model."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
        """The network's prediction, a ``losses.Denoiser``.

        Args:
            model: The denoiser, or a copy or wrapper of it.
            noisy_sample: [B, C, h, w].
            timesteps: [B], of ``process.conditioning``.
            condition: What ``encode_prompts`` and ``size_condition`` return; everything else that the network takes,
                such as positions and packing, is made inside.

        Returns:
            [B, C, h, w] in the dtype of ``model``.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of each prompt: tensors [N, ...] in the encoders' dtype, on the model's device.

        The empty prompt is the null condition of classifier-free guidance, as the checkpoint's pipeline makes it.
        """

    def materialize_denoiser(self) -> nn.Module:
        """``denoiser``, or where that is empty, one with weights that lives as long as the caller holds it."""
        if not self.denoiser_is_meta:
            return self.denoiser
        return load_component(self.checkpoint, self.denoiser_component, self.dtype, self.device)

    @property
    def denoiser_is_meta(self) -> bool:
        """Whether the denoiser's weights are on the disk alone, and its parameters on the meta device."""
        return any(parameter.is_meta for parameter in self.denoiser.parameters())

    @property
    def latent_scale(self) -> int:
        """Pixels per latent along one side."""
        return vae_scale(self.configs["vae"])

    @property
    def size_multiple(self) -> int:
        """Both sides of an image, in pixels, must be multiples of it."""
        return self.latent_scale

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was trained for."""
        height, width = self.default_latent_size(self.configs[self.denoiser_component])
        return height * self.latent_scale, width * self.latent_scale

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w) of the latent of an image of ``height`` x ``width`` pixels.

        Raises:
            UserError: A side is no multiple of ``size_multiple``.
        """
        multiple = self.size_multiple
        if height <= 0 or width <= 0 or height % multiple or width % multiple:
            raise UserError(f"An image of {height}x{width} does not fit this model: give multiples of {multiple}.")
        return self.configs["vae"].latent_channels, height // self.latent_scale, width // self.latent_scale

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, *, sample_ids: Tensor | None = None, seed: int = 0) -> Tensor:
        """Latents of images, normalised as the denoiser expects them.

        Args:
            pixels: [B, 3, H, W] in [-1, 1].
            sample_ids: [B] int64: draw from the VAE's posterior, addressed by (seed, sample id). None for its mean.
            seed: Of the draws.

        Returns:
            [B, C, h, w] float32.
        """
        posterior = self._posterior(pixels.to(self.device, torch.float32))
        latents: Tensor = posterior.mean
        if sample_ids is not None:
            key = noise_key(seed, POSTERIOR_NOISE, self.device)
            ids = sample_ids.to(self.device)
            latents = latents + posterior.std * philox_noise(ids, key, int(NoiseRole.SAMPLING), latents.shape[1:])
        return self._normalized(latents)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] float32 in [-1, 1] of ``latents`` [B, C, h, w]: the inverse of ``encode_images``."""
        return self._pixels(self._denormalized(latents.to(self.device, torch.float32))).clamp(-1, 1)

    def _posterior(self, pixels: Tensor) -> Any:
        """The VAE's distribution of latents, with ``mean`` and ``std`` [B, C, h, w]."""
        vae: Any = self.encoders["vae"]
        return vae.encode(pixels).latent_dist

    def _pixels(self, latents: Tensor) -> Tensor:
        """What the VAE decodes latents to that are not normalised."""
        vae: Any = self.encoders["vae"]
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels

    def _normalized(self, latents: Tensor) -> Tensor:
        """Latents of the VAE as the denoiser takes them: shifted and scaled, or standardised channel by channel."""
        shift, scale = latent_statistics(self.configs["vae"], self.device)
        normalized: Tensor = (latents - shift) * scale
        return normalized

    def _denormalized(self, latents: Tensor) -> Tensor:
        """The inverse of ``_normalized``."""
        shift, scale = latent_statistics(self.configs["vae"], self.device)
        denormalized: Tensor = latents / scale + shift
        return denormalized

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        """``{"time_ids": [count, 6]}`` for SDXL, from (height, width), (top, left), (height, width); {} elsewhere."""
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
        """Text encoders and VAE leave memory until they are next needed; ``hash`` stays."""
        self._encoders = None

    def change_encoders(self, changes: Mapping[str, Changes]) -> None:
        """Read text encoders with ``changes`` to their weights from now on, and save them so; ``hash`` follows."""
        self.checkpoint = ChangedCheckpoint(self.checkpoint, changes)
        self.release_encoders()
        vars(self).pop("hash", None)

    def restore_encoders(self) -> None:
        """Load text encoders and VAE now; whatever needs them does so by itself."""
        _ = self.encoders

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
        """Images of ``prompts`` by the checkpoint's diffusers pipeline and scheduler.

        The noise of image i, a stochastic sampler's included, is addressed by (seed, i): neither the batch size nor the
        other prompts change it.

        Args:
            prompts: One for each image.
            negative_prompt: For all of them.
            guidance_scale: None for the family's ``default_guidance``.
            num_inference_steps: Of the sampler.
            height: In pixels; None for the model's ``default_size``.
            width: In pixels; None for the model's ``default_size``.
            seed: Of the noise.
            batch_size: Images that are made at once.
            progress: Called with the number of images after each batch.

        Returns:
            uint8 [N, H, W, 3] on the host.
        """
        return sample_images(
            self,
            prompts,
            negative_prompt=negative_prompt,
            guidance_scale=self.default_guidance if guidance_scale is None else guidance_scale,
            num_inference_steps=num_inference_steps,
            size=(height or self.default_size[0], width or self.default_size[1]),
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    def negative_arguments(self, prompt: str, count: int) -> dict[str, Any]:
        """The pipeline's arguments for a negative prompt of ``count`` images."""
        # Left out when empty: the pipeline then takes the checkpoint's own null condition.
        return {"negative_prompt": [prompt] * count} if prompt else {}

    def text_length(self) -> dict[str, Any]:
        """The pipeline's arguments for the length of prompts, so that all calls see the same tokens."""
        return {}

    def packed(self, latents: Tensor) -> Tensor:
        """``latents`` [B, C, h, w] as the pipeline and the network take them."""
        return latents

    def unpacked(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``packed``, for ``latent_shape``."""
        return latents

    @cached_property
    def hash(self) -> str:
        """SHA-256 over encoders and VAE: what a cache of latents and embeddings depends on."""
        shift, scale = latent_statistics(self.configs["vae"], self.device)
        tokenizers = [(tokenizer.pad_token, tokenizer.model_max_length) for tokenizer in self.tokenizers.values()]
        # The modules' repr changes with the libraries that define them; it stays, or every cache would go cold.
        modules = [check_component(self.checkpoint, name) for name in self.encoder_names]
        described = (str(self.dtype), scale, shift, tokenizers, modules)
        return fingerprint(described, self._stored_encoders())

    def _stored_encoders(self) -> Iterator[tuple[str, Tensor]]:
        for component in ("vae", *self.encoder_names):
            owner = f"{component} of {self.checkpoint.path}"
            stored = self.checkpoint.tensors(component)
            for name, tensor in sorted(((canonical_name(n), t) for n, t in stored.items()), key=lambda item: item[0]):
                yield f"{component}.{name}", finite_weight(tensor.load(), owner, name)

    def denoiser_hash(self) -> str:
        """SHA-256 over the denoiser's weights as they are now."""
        weights = self.denoiser_weights if self.denoiser_is_meta else {}
        named = sorted(self.denoiser.state_dict().items())
        return fingerprint(
            self.denoiser_component, ((name, weights[name]() if name in weights else tensor) for name, tensor in named)
        )

    def measure_update(self, dtype: SavedDtype = None) -> WeightUpdate:
        """Compare the denoiser with the checkpoint, and choose the dtypes to save it in: see ``weight_update``."""
        stored = {canonical_name(n): t.dtype for n, t in self.checkpoint.tensors(self.denoiser_component).items()}
        dtypes = {name: stored[canonical_name(name)] for name in self.denoiser_weights}
        return measure_update(self.denoiser_weights, self.denoiser.state_dict(), dtypes, dtype)

    def save(
        self,
        path: Path,
        *,
        layout: Layout = "diffusers",
        dtype: SavedDtype = None,
        max_shard_size: int = 10_000_000_000,
        replace: bool = False,
        update: WeightUpdate | None = None,
    ) -> None:
        """Write the whole checkpoint, atomically: a diffusers folder, or one file in the original layout (sd, sdxl).

        Args:
            path: The folder or file.
            layout: "diffusers" or "single-file".
            dtype: None or "stored": every tensor that did not change has the input's bits, and those that did have its
                dtype, or for None a wider one where that would lose more than 1% of the change.
            max_shard_size: In bytes, for the folder.
            replace: Take the place of a ``path`` that exists.
            update: What ``measure_update`` returned for ``dtype``; None measures now.

        Raises:
            RunFailedError: A weight is not finite, or becomes so in ``dtype``.
            UserError: The family lacks the layout, ``path`` exists and is not to be replaced, or the disk refuses.
        """
        if path.resolve() == self.checkpoint.path.resolve():
            raise UserError(f"{path} is where the model came from, and is still read from: save it under another name.")
        metadata = modelspec(
            self.checkpoint.metadata,
            architecture=self.architecture,
            implementation="diffusers" if layout == "diffusers" else STABILITY_AI,
            prediction_type=self.process.prediction_type,
            size=self.default_size,
        )
        update = update or self.measure_update(dtype)
        common: dict[str, Any] = {
            "trained": {self.denoiser_component: self.denoiser.state_dict()},
            "metadata": metadata,
            "dtype": dtype if isinstance(dtype, torch.dtype) else None,
            "trained_dtypes": update.dtypes,
            "replace": replace,
        }
        if layout == "diffusers":
            save_folder(self.checkpoint, path, max_shard_size=max_shard_size, **common)
            return
        if self.original_layout is None:
            raise UserError(f"A {self.family} model has no single-file layout here: save it as a diffusers folder.")
        save_single_file(
            self.checkpoint,
            path,
            layout=self.original_layout,
            markers=prediction_markers(self.scheduler.config),
            **common,
        )

    @property
    @abstractmethod
    def architecture(self) -> str:
        """As ModelSpec names it."""

    @property
    def original_layout(self) -> str | None:
        """The layout of the family's single files, of ``original_layout.LAYOUTS``; None for a family without."""
        return None


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a network computes in: that of its first weight."""
    return next(model.parameters()).dtype
