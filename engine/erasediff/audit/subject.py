"""Subject of an audit: one model, asked for prompts, classes or nothing through one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from erasediff.audit.asks import Ask
from erasediff.config import SampleConfig
from erasediff.diffusion.losses import DenoisingObjective
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.evaluation.probe_sampler import ExtraNoise, Known, Predict, ddim, spaced_timesteps
from erasediff.evaluation.sampling import sample_images
from erasediff.models.base import LatentModel
from erasediff.models.pipeline import INITIAL_NOISE
from erasediff.models.pixel_unet import PixelModel
from erasediff.models.unprompted_latents import UnpromptedLatentModel
from erasediff_kernels import philox_noise

Model = LatentModel | PixelModel | UnpromptedLatentModel
PROBE_NOISE = 2**32
"""Step in the Philox address of a probe's noise, past those of ``models.pipeline``."""


class Subject:
    """Model under audit, or the base that controls it.

    Args:
        name: "model", "base" or "reference".
        model: Loaded model; its denoiser is set to evaluation mode.
        settings: Sampler's steps, guidance and batch size.
        size: (height, width) of images in pixels; None for the model's own.
        is_edited: Whether an eraser is attached to the denoiser, which whoever has the weights can take off.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        settings: SampleConfig,
        *,
        size: tuple[int, int] | None = None,
        is_edited: bool = False,
    ) -> None:
        self.name, self.model, self.settings, self.is_edited = name, model, settings, is_edited
        self.size = size or (model.default_size if isinstance(model, LatentModel) else model.image_shape[1:])
        self.process = model.process.to(model.device)
        self.objective = DenoisingObjective(process=self.process, denoiser=model.predict)
        model.denoiser.requires_grad_(False).eval()
        self._encoded: dict[Ask, dict[str, Tensor]] = {}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample, of the image itself or its latent."""
        return self.model.latent_shape(*self.size) if isinstance(self.model, LatentModel) else self.model.sample_shape

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return self.settings.num_inference_steps

    @property
    def guidance(self) -> float:
        """Guidance scale of the samples; 1 where the model has no null condition."""
        if not isinstance(self.model, LatentModel) and self.model.null_label is None:
            return 1.0
        given = self.settings.guidance_scale
        return self.model.default_guidance if given is None else given

    @property
    def passes_per_image(self) -> int:
        """Forward passes of the denoiser for one image."""
        is_doubled = self.guidance not in (0.0, 1.0) and not self._is_distilled
        return self._timesteps * (2 if is_doubled else 1)

    @cached_property
    def _timesteps(self) -> int:
        """Timesteps of the checkpoint's sampler: PNDM takes one of its steps twice."""
        if not isinstance(self.model, LatentModel) or self.model.flow:
            return self.steps
        scheduler = type(self.model.scheduler).from_config(self.model.scheduler.config)
        scheduler.set_timesteps(self.steps)
        return len(scheduler.timesteps)

    @property
    def _is_distilled(self) -> bool:
        return isinstance(self.model, LatentModel) and not self.model.has_null_prediction

    def guided(self, scale: float) -> Subject:
        """This model at another guidance scale."""
        settings = self.settings.model_copy(update={"guidance_scale": scale})
        return Subject(self.name, self.model, settings, size=self.size, is_edited=self.is_edited)

    def condition(self, asks: Sequence[Ask]) -> dict[str, Tensor]:
        """Condition of each ask, tensors [N, ...]."""
        if isinstance(self.model, LatentModel):
            rows = [self._encode(self.model, ask) for ask in asks]
            condition = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            return condition | self.model.size_condition(self.size, (0, 0), self.size, len(asks))
        if self.model.condition == "none":
            return {}
        labels = [self.model.null_label if ask.class_label is None else ask.class_label for ask in asks]
        return {"class_labels": torch.tensor(labels, device=self.model.device)}

    def _encode(self, model: LatentModel, ask: Ask) -> dict[str, Tensor]:
        if ask not in self._encoded:
            self._encoded[ask] = model.encode_prompts([ask.prompt or ""])
        return self._encoded[ask]

    @property
    def any_ask(self) -> Ask:
        """Something that the model can be asked for, to time it."""
        return Ask("", "", 0)

    def draw(self, asks: Sequence[Ask], seed: int) -> Tensor:
        """Images uint8 [N, 3, H, W] on the host by the checkpoint's own sampler; noise i is that of (seed, i)."""
        if isinstance(self.model, LatentModel):
            images = self.model.sample(
                [ask.prompt or "" for ask in asks],
                negative_prompt=self.settings.negative_prompt,
                guidance_scale=self.guidance,
                num_inference_steps=self.steps,
                height=self.size[0],
                width=self.size[1],
                seed=seed,
                batch_size=self.settings.batch_size,
            )
            return images.permute(0, 3, 1, 2)
        return as_pictures(
            sample_images(
                self.model,
                None if self.model.condition == "none" else self.condition(asks)["class_labels"].cpu(),
                len(asks),
                guidance_scale=self.guidance,
                num_inference_steps=self.steps,
                seed=seed,
                batch_size=self.settings.batch_size,
            )
        )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Samples float32 [N, ...] of images uint8 [N, 3, H, W], as the denoiser takes them."""
        parts = [
            self.model.encode_images(part.to(self.model.device).float() / 127.5 - 1)
            for part in torch.split(pixels, self.settings.batch_size)
        ]
        samples = torch.cat(parts)
        return samples.float() / 127.5 - 1 if samples.dtype == torch.uint8 else samples

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Images uint8 [N, 3, H, W] on the host of samples [N, ...]."""
        model = self.model
        decode = model.decode_latents if isinstance(model, LatentModel) else model.decode_samples
        return as_pictures(torch.cat([decode(part) for part in torch.split(samples, self.settings.batch_size)]))

    def probe(
        self,
        condition: Mapping[str, Tensor],
        count: int,
        seed: int,
        *,
        until: tuple[Subject, int] | None = None,
        extra: ExtraNoise | None = None,
        start: tuple[Tensor, float] | None = None,
        given: tuple[Tensor, Tensor] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Images uint8 [N, 3, H, W] by DDIM from condition [N, ...], the trajectory changed as a probe does.

        Args:
            condition: One row for each image; {} of an unconditional model.
            count: Number of images.
            seed: Seed of the noise; noise i is that of (seed, i).
            until: Another model that takes the first steps, and their number.
            extra: Noise added at every step.
            start: Clean samples [N, ...] to begin from, noised to this share of the trajectory (SDEdit, Meng et al.
                2022).
            given: Clean samples [N, ...] and the mask of what is drawn of them.
            steps: Steps of the sampler; None for those of the settings.
        """
        images = []
        for ids in torch.split(torch.arange(count), self.settings.batch_size):
            rows = {name: value[ids.to(value.device)] for name, value in condition.items()}
            sample = self._probed(ids, rows, seed, until, extra, start, given, steps or self.steps)
            images.append(self.decode(sample))
        return torch.cat(images)

    def _probed(
        self,
        ids: Tensor,
        condition: Mapping[str, Tensor],
        seed: int,
        until: tuple[Subject, int] | None,
        extra: ExtraNoise | None,
        start: tuple[Tensor, float] | None,
        given: tuple[Tensor, Tensor] | None,
        steps: int,
    ) -> Tensor:
        timesteps = spaced_timesteps(self.process, steps)
        sample, first = self.noise(ids, seed, INITIAL_NOISE), 0
        known = None
        if given is not None:
            known = Known(given[0][ids], given[1], sample)
        if start is not None:
            first = min(round(steps * (1 - start[1])), steps - 1)
            alpha, sigma = (table[timesteps[first]] for table in (self.process.alpha, self.process.sigma))
            sample = alpha * start[0][ids] + sigma * sample
        own = self.predictor(condition)
        predict = own
        if until is not None:
            other, handover = until[0].predictor(condition), until[1]

            def predict(step: int, noisy: Tensor, timestep: int) -> Tensor:
                return (other if step < handover else own)(step, noisy, timestep)

        return ddim(
            self.process,
            sample,
            timesteps,
            predict,
            first=first,
            extra=extra,
            draw=lambda step: self.noise(ids, seed, PROBE_NOISE + step),
            known=known,
            bound=1.0 if self.model.space == "pixel" else None,
        )

    def noise(self, ids: Tensor, seed: int, step: int) -> Tensor:
        """Standard normal noise [B, ...] of sample ids [B], addressed by (seed, step, id)."""
        key = noise_key(seed, step, self.model.device)
        noise: Tensor = philox_noise(
            ids.to(self.model.device), key, int(NoiseRole.SAMPLING), torch.Size(self.sample_shape)
        )
        return noise

    def predictor(self, condition: Mapping[str, Tensor], network: nn.Module | None = None) -> Predict:
        """The guided prediction under condition [B, ...] at a train timestep."""
        model, network = self.model, network or self.model.denoiser
        guidance = self.guidance
        is_guided = bool(condition) and guidance != 1.0 and not self._is_distilled
        null = self.condition([Ask("", "")] * len(next(iter(condition.values())))) if is_guided else {}

        def predict(step: int, noisy: Tensor, timestep: int) -> Tensor:
            told = self.process.conditioning[timestep].expand(len(noisy))
            if self._is_distilled:
                scale = torch.full((len(noisy),), guidance, device=noisy.device)
                return model.predict(network, noisy, told, {**condition, "guidance": scale}).float()
            if not is_guided:
                return model.predict(network, noisy, told, condition).float()
            both = {name: torch.cat((value, null[name])) for name, value in condition.items()}
            prediction = model.predict(network, torch.cat((noisy, noisy)), torch.cat((told, told)), both)
            conditional, unconditional = prediction.float().chunk(2)
            return torch.lerp(unconditional, conditional, guidance)

        return predict


def as_pictures(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] on the host of images [N, 1 or 3, H, W] in [-1, 1]."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return levels.expand(-1, 3, -1, -1).contiguous()
