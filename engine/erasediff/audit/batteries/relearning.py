"""Battery: fine-tuning that brings the concept back, on its images or on others."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from torch import nn

from erasediff.audit.asks import Pictures
from erasediff.audit.batteries.base import BACKWARD, Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares, where
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Positive, Section
from erasediff.evaluation.attacks import RepeatedBatches, relearning_curve
from erasediff.models import lora
from erasediff.models.trainable import has_attention, select

CONCEPT, AUXILIARY = "concept", "auxiliary"


class RelearningSettings(Section):
    """Settings of fine-tuning.

    Attributes:
        images: Numbers of images of the concept to learn from.
        weights: Weights that are trained: all, or a LoRA.
        auxiliary: Also fine-tune all weights on retained images alone (DiMRA).
        steps: Steps after which the concept is looked for.
        lr: Learning rate of all weights.
        lora_lr: Learning rate of a LoRA.
        lora_rank: Its rank.
        batch_size: Images per step.
    """

    images: tuple[Count, ...] = (10, 100)
    weights: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    auxiliary: bool = True
    steps: tuple[Count, ...] = (5, 10, 20, 40)
    lr: Positive = 1e-4
    lora_lr: Positive = 1e-3
    lora_rank: Count = 16
    batch_size: Count = 16


class Relearning(Battery[RelearningSettings]):
    """Share of images of the forgotten prompts in which the concept is seen, over steps of fine-tuning."""

    name = "relearning"
    order = 9
    title = "Relearning"
    source = "fine-tuning attacks; on auxiliary data DiMRA (arXiv 2512.03564), which knows nothing of the concept"
    settings_class = RelearningSettings
    quick: ClassVar = {"images": (25,), "weights": ("full",), "steps": (10, 40)}

    def unfit(self) -> str | None:
        if self.audit.model.is_edited:
            return "an eraser is attached to the base, and whoever has the weights takes it off: nothing is relearned"
        return None

    def passes(self) -> float:
        steps = max(self.settings.steps)
        training = steps * self.settings.batch_size * (1 + BACKWARD)
        looks = (len(self.settings.steps) + 1) * self.images * self.audit.model.passes_per_image
        return len(self.pieces()) * (training + looks)

    def pieces(self) -> Sequence[Piece]:
        counts = dict.fromkeys(min(count, len(self.audit.concept_images)) for count in self.settings.images)
        found = [
            {"data": CONCEPT, "weights": weights, "images": count}
            for weights in self.settings.weights
            for count in counts
            if weights == "full" or has_attention(self.audit.model.model.denoiser)
        ]
        others = self.audit.request.retained_images
        if self.settings.auxiliary and others is not None:
            found.append({"data": AUXILIARY, "weights": "full", "images": len(others)})
        return found

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        settings, seed = self.settings, self.seed(piece)
        pictures = self._pictures(piece)
        batches = RepeatedBatches(
            subject.encode(pictures.pixels), subject.condition(pictures.asks), settings.batch_size
        )
        asks = [self.audit.attacked[number % len(self.audit.attacked)] for number in range(self.images)]
        rows: list[Row] = []
        looked = [0, *sorted(settings.steps)]

        def measure() -> float:
            images = subject.draw(asks, seed)
            step = looked[len(rows) // self.images]
            rows.extend(self.audit.look(self.name, {**piece, "step": step}, subject, images))
            return sum(bool(row["seen"]) for row in rows[-self.images :]) / self.images

        with self._copied(subject, piece["weights"], seed) as network:
            relearning_curve(
                network,
                subject.process,
                batches,
                measure,
                steps=looked[1:],
                lr=settings.lr if piece["weights"] == "full" else settings.lora_lr,
                denoiser=subject.model.predict,
                seed=seed,
            )
        return rows

    def _pictures(self, piece: Piece) -> Pictures:
        if piece["data"] == CONCEPT:
            return self.audit.concept_images.some(piece["images"])
        assert self.audit.request.retained_images is not None
        return self.audit.request.retained_images

    @contextmanager
    def _copied(self, subject: Subject, weights: str, seed: int) -> Iterator[nn.Module]:
        """A copy of the denoiser in the model's place within the block, whose weights to train take gradients."""
        model: Any = subject.model
        own = model.denoiser
        network = copy.deepcopy(own).requires_grad_(weights == "full")
        if weights == "lora":
            lora.add(network, rank=self.settings.lora_rank, targets=select(network, "xattn"), seed=seed % 2**31)
        model.denoiser = network
        try:
            yield network
        finally:
            model.denoiser = own

    def figures(self, rows: Rows) -> list[Figure]:
        last = max(self.settings.steps)
        found = []
        for piece in self.pieces():
            name = f"{piece['weights']} weights, {piece['images']} {piece['data']} images"
            at_last = where(rows, **piece, step=last)
            kind = "relearned" if piece["data"] == CONCEPT else "recovered"
            found.append(shares(f"After {last} steps of {name}, seen", at_last, kind=kind))
        found.append(shares("Before the first step, seen", where(rows, step=0), kind="mean"))
        return found
