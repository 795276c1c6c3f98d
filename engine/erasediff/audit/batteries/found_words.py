"""Battery: words before a forgotten prompt that bring the concept back (UnlearnDiffAtk)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

from erasediff.audit.asks import Ask
from erasediff.audit.batteries.base import BACKWARD, Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares, worst
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Section
from erasediff.evaluation.attacks import PromptSearch, single_token_words
from erasediff.models.base import LatentModel
from erasediff.models.text_tokens import text_encoders


class FoundWordsSettings(Section):
    """Settings of the search.

    Attributes:
        words: Words before the prompt; UnlearnDiffAtk's k, 3 for objects and 5 for nudity.
        steps: Exchanges of one word; UnlearnDiffAtk's 40 iterations.
        candidates: Words tried in each.
        batch_size: Images per step.
        most_words: Words of the vocabulary that are tried, at most.
    """

    words: Count = 3
    steps: Count = 40
    candidates: Count = 8
    batch_size: Count = 32
    most_words: Count = 5000


class FoundWords(Battery[FoundWordsSettings]):
    """Share of images of the found prompts in which the concept is seen."""

    name = "found-words"
    order = 3
    title = "Found words"
    source = (
        "UnlearnDiffAtk (Zhang et al. 2024, arXiv 2310.11868) by exchanges of words (HotFlip, Ebrahimi et al. 2018; "
        "GCG, Zou et al. 2023)"
    )
    settings_class = FoundWordsSettings
    quick: ClassVar = {"steps": 6, "candidates": 4, "batch_size": 16}

    def unfit(self) -> str | None:
        if self.audit.condition != "text":
            return "the model takes no prompts"
        if len(self.vocabulary) < 2:
            return "its text encoders have no common words of one token"
        return None

    @cached_property
    def vocabulary(self) -> list[str]:
        """Words of one token in all text encoders, without the concept's own."""
        model = self.audit.model.model
        assert isinstance(model, LatentModel)
        own = {word for ask in self.audit.request.forgotten for word in (ask.prompt or "").lower().split()}
        concept = {part for word in self.audit.request.words for part in word.lower().split()}
        words = [word for word in single_token_words(model) if word not in own | concept]
        step = max(1, -(-len(words) // self.settings.most_words))
        return words[::step]

    def passes(self) -> float:
        settings, searched = self.settings, len(self.pieces())
        size = min(settings.batch_size, self.audit.settings.concept_images)
        search = size * (settings.steps * (BACKWARD + 2 + settings.candidates) + settings.steps + 3)
        return searched * (search + self.images * self.audit.model.passes_per_image)

    def pieces(self) -> Sequence[Piece]:
        return [{"number": number} for number in range(len(self.audit.attacked))]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        model, settings, seed = subject.model, self.settings, self.seed(piece)
        assert isinstance(model, LatentModel)
        latents = subject.encode(self.audit.concept_images.pixels)
        search = PromptSearch(model, latents, self.vocabulary, batch_size=settings.batch_size, seed=seed)
        prompt = self.audit.attacked[piece["number"]].prompt or ""
        # Words that push the concept's own out of the encoder's length would attack nothing.
        words = min(settings.words, *(encoder.room(prompt) for encoder in text_encoders(model)))
        found = search.search(prompt, words=max(words, 1), steps=settings.steps, candidates=settings.candidates)
        images = subject.draw([Ask(found.prompt, found.prompt)] * self.images, seed)
        return self.audit.look(
            self.name, piece, subject, images, prompt=found.prompt, loss=found.loss, unattacked=found.unattacked_loss
        )

    def figures(self, rows: Rows) -> list[Figure]:
        return [
            shares("Found words, seen: the attacker's best", worst(rows, ("number",))),
            shares("Found words, seen: all", rows, kind="mean"),
        ]
