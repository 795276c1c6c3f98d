"""A model under examination: its conditions, and what it draws of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.config import SampleConfig
from erasediff.evaluation.sampling import sample_images
from erasediff.models.base import LatentModel
from erasediff.models.pixel_unet import PixelModel
from erasediff.models.unprompted_latents import UnpromptedLatentModel
from erasediff.verdict.judges.base import Candidate

AnyModel = LatentModel | PixelModel | UnpromptedLatentModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedModel:
    """A model of any family, with the settings that it draws with.

    Attributes:
        model: The model.
        settings: Guidance, steps and images per call.
        size: (height, width) of a text-to-image model's images in pixels; None for its own.
        attached: Context in which the model draws, such as that of a concept eraser.
    """

    model: AnyModel
    settings: SampleConfig
    size: tuple[int, int] | None = None
    attached: Callable[[], AbstractContextManager[object]] = nullcontext

    def candidate(self, text: str, label: str | None = None) -> Candidate:
        """The candidate of a caption, or of a class by name; of no condition for an unconditional model.

        ``label`` is its name in tables; None for ``text``.

        Raises:
            ValueError: The model has no such class.
        """
        model, label = self.model, label or text
        if isinstance(model, LatentModel):
            size = self.size or model.default_size
            condition = model.encode_prompts([text]) | model.size_condition(size, (0, 0), size, 1)
            return Candidate(label, text, {name: value.cpu() for name, value in condition.items()})
        if model.condition == "none":
            return Candidate(label, text)
        return Candidate(label, text, {"class_labels": torch.tensor([model.class_names.index(text)])})

    def null_condition(self) -> Mapping[str, Tensor] | None:
        """The condition that classifier-free guidance leads away from; None for a model without."""
        model = self.model
        if isinstance(model, LatentModel):
            return self.candidate("").condition if model.has_null_prediction else None
        return None if model.null_label is None else {"class_labels": torch.tensor([model.null_label])}

    def draw(
        self,
        candidate: Candidate,
        count: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
        *,
        prompts: Sequence[str] = (),
    ) -> Tensor:
        """Draw ``count`` images of a candidate: uint8 [N, C, H, W] on the host, of 3 channels or 1.

        Image i is a function of (seed, i) and what it is asked for: two models are compared image by image.

        Args:
            candidate: What to draw.
            count: Number of images.
            seed: Seed of the noise.
            progress: Called with the number of images after each batch.
            prompts: Captions to ask a text-to-image model with, in turn; () for the candidate's.
        """
        with self.attached():
            return self._drawn(candidate, count, seed, progress, prompts or (candidate.text,))

    def _drawn(
        self,
        candidate: Candidate,
        count: int,
        seed: int,
        progress: Callable[[int], None] | None,
        prompts: Sequence[str],
    ) -> Tensor:
        model, settings = self.model, self.settings
        if isinstance(model, LatentModel):
            height, width = self.size or model.default_size
            return model.sample(
                [prompts[number % len(prompts)] for number in range(count)],
                negative_prompt=settings.negative_prompt,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=settings.num_inference_steps,
                height=height,
                width=width,
                seed=seed,
                batch_size=settings.batch_size,
                progress=progress,
            ).permute(0, 3, 1, 2)
        images = sample_images(
            model,
            candidate.condition["class_labels"].expand(count) if candidate.condition else None,
            count,
            guidance_scale=settings.guidance_scale if model.null_label is not None else None,
            num_inference_steps=settings.num_inference_steps,
            seed=seed,
            batch_size=settings.batch_size,
            progress=progress,
        )
        return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
