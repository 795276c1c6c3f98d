"""Battery: textual inversion of the concept's word in all text encoders (CCE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from erasediff.audit.batteries.base import BACKWARD, Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares, worst
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Positive, Section
from erasediff.evaluation.attacks import in_place_of, textual_inversion
from erasediff.models.base import LatentModel

OWN = ""
"""Start from the word's own embeddings."""


class InversionSettings(Section):
    """Settings of textual inversion.

    Attributes:
        steps: Steps of Adam; CCE takes 5,000 on Stable Diffusion 1.4.
        lr: Learning rate; CCE's 5e-3 is scaled by its batch of 16.
        batch_size: Images per step.
        starts: Words to start from, "" for the word itself.
        tokens: Tokens of the word that are learned: the last one, or all.
    """

    steps: Count = 1000
    lr: Positive = 5e-3
    batch_size: Count = 16
    starts: tuple[str, ...] = (OWN, "thing")
    tokens: Literal["last", "all"] = "all"


class Inversion(Battery[InversionSettings]):
    """Share of images of an inverted word in which the concept is seen."""

    name = "inversion"
    order = 2
    title = "Inverted words"
    source = "CCE (Pham et al. 2023, arXiv 2308.01508); textual inversion (Gal et al. 2022)"
    settings_class = InversionSettings
    quick: ClassVar = {"steps": 100, "lr": 1e-2, "starts": ("",)}

    def unfit(self) -> str | None:
        if self.audit.condition != "text":
            return "the model takes no prompts"
        return None if self.audit.request.words else "no word of the concept is known: give --word"

    def passes(self) -> float:
        learning = self.settings.steps * self.settings.batch_size * (1 + BACKWARD)
        return len(self.pieces()) * (learning + self.images * self.audit.model.passes_per_image)

    def pieces(self) -> Sequence[Piece]:
        found = []
        for number, ask in enumerate(self.audit.attacked):
            words = [word for word in self.audit.request.words if word in (ask.prompt or "")]
            found += [
                {"number": number, "word": word, "start": start} for word in words for start in self.settings.starts
            ]
        return found

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        model, ask, settings = subject.model, self.audit.attacked[piece["number"]], self.settings
        assert isinstance(model, LatentModel)
        prompt, word = ask.prompt or "", piece["word"]
        vectors = textual_inversion(
            model,
            subject.encode(self.audit.concept_images.pixels),
            prompt,
            word,
            start=piece["start"] or None,
            tokens=settings.tokens,
            steps=settings.steps,
            lr=settings.lr,
            batch_size=settings.batch_size,
            seed=self.seed(piece),
        )
        with in_place_of(model, word, vectors):
            images = subject.draw([ask] * self.images, self.seed(piece))
        return self.audit.look(self.name, piece, subject, images, prompt=prompt)

    def figures(self, rows: Rows) -> list[Figure]:
        return [
            shares("Inverted word, seen: the attacker's best", worst(rows, ("number", "word", "start"))),
            shares("Inverted word, seen: all", rows, kind="mean"),
        ]
