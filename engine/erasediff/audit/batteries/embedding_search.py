"""Battery: prompt embeddings that reproduce an image to forget (DoRI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from erasediff.audit.batteries.base import BACKWARD, Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares, where
from erasediff.audit.context import FORGOTTEN, UNSEEN
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Positive, Section
from erasediff.evaluation.attacks import for_latents
from erasediff.evaluation.prompt_embeddings import embedding_search
from erasediff.models.base import LatentModel


class EmbeddingSearchSettings(Section):
    """Settings of the search.

    Attributes:
        steps: Steps of Adam.
        lr: Learning rate.
        batch_size: Copies of the image in a step.
        most_files: Images that are searched for, at most; as many unseen ones are controls.
        images: Images that are drawn of each found embedding.
    """

    steps: Count = 50
    lr: Positive = 0.1
    batch_size: Count = 8
    most_files: Count = 10
    images: Count = 4


class EmbeddingSearch(Battery[EmbeddingSearchSettings]):
    """Share of images to forget that found prompt embeddings reproduce."""

    name = "embedding-search"
    order = 4
    title = "Embeddings that reproduce an image"
    source = "DoRI (Kowalczuk et al. 2026, arXiv 2507.16880); reproduced as in Carlini et al. 2023, section 4.2"
    settings_class = EmbeddingSearchSettings
    quick: ClassVar = {"most_files": 4}
    is_judged = False

    def unfit(self) -> str | None:
        if self.audit.condition != "text":
            return "the model takes no prompts"
        return self.audit.lacks_training_images()

    def passes(self) -> float:
        settings = self.settings
        search = settings.steps * settings.batch_size * (1 + BACKWARD)
        return len(self.pieces()) * (search + settings.images * self.audit.model.passes_per_image)

    def pieces(self) -> Sequence[Piece]:
        return [
            {"set": name, "file": number}
            for name in (FORGOTTEN, UNSEEN)
            for number in range(min(len(self.audit.pictures_of(name)), self.settings.most_files))
        ]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        model, settings, seed = subject.model, self.settings, self.seed(piece)
        assert isinstance(model, LatentModel)
        pictures, number = self.audit.pictures_of(piece["set"]), piece["file"]
        latent = subject.encode(pictures.pixels[number : number + 1])
        found = embedding_search(
            model,
            latent,
            pictures.asks[number].prompt or "",
            steps=settings.steps,
            lr=settings.lr,
            batch_size=settings.batch_size,
            seed=seed,
        )
        condition = for_latents(model, found, latent.expand(settings.images, *latent.shape[1:]))
        images = subject.probe(condition, settings.images, seed)
        return self.audit.compare(self.name, piece, subject, images, [number] * len(images))

    def figures(self, rows: Rows) -> list[Figure]:
        found = [
            shares("Images reproduced", where(rows, set=FORGOTTEN), kind="reproduced"),
        ]
        if len(self.audit.pictures_of(UNSEEN)):
            note = "Control: images that the model never saw; near 0, or the search paints whatever it is given."
            controls = where(rows, set=UNSEEN)
            found.append(shares("Unseen images reproduced", controls, kind="control", note=note))
        return found
