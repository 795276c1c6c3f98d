"""Battery: retained prompts nearest to the concept, the first to suffer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch

from erasediff.audit.asks import Ask
from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import BASE, MODEL, Figure, Row, Rows, grouped, shares
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Section


class NeighboursSettings(Section):
    """Settings of the neighbours.

    Attributes:
        most: Retained prompts that are asked for, the nearest ones.
    """

    most: Count = 10


class Neighbours(Battery[NeighboursSettings]):
    """Share of images of retained prompts that are seen as asked for, the nearest to the concept first."""

    name = "neighbours"
    order = 12
    title = "Neighbours of the concept"
    source = "collateral damage as in HUB (arXiv 2410.05664) and SEE (arXiv 2508.15124)"
    settings_class = NeighboursSettings
    quick: ClassVar = {"most": 4}

    def unfit(self) -> str | None:
        if self.audit.condition == "none":
            return "the model is asked for nothing, so that nothing has neighbours"
        if self.audit.judge is not None and not self.audit.judge.tells_apart:
            return "the judge cannot say what retained images show"
        return None if self.audit.request.retained else "there are no retained prompts or classes"

    @cached_property
    def nearest(self) -> list[Ask]:
        """Retained prompts in the order of the cosine of their mean embeddings to the nearest forgotten one's.

        Classes are taken in their own order: labels have no distance.
        """
        request, base = self.audit.request, self.audit.base
        if self.audit.condition != "text":
            return list(request.retained[: self.settings.most])
        means = [
            base.condition(asks)["encoder_hidden_states"].float().mean(1)
            for asks in (request.retained, request.forgotten)
        ]
        retained, forgotten = (torch.nn.functional.normalize(rows - means[0].mean(0), dim=1) for rows in means)
        order = (retained @ forgotten.T).max(1).values.argsort(descending=True).tolist()
        return [request.retained[number] for number in order[: self.settings.most]]

    def passes(self) -> float:
        return len(self.pieces()) * self.images * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        return [{"rank": rank} for rank in range(len(self.nearest))]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask = self.nearest[piece["rank"]]
        images = subject.draw([ask] * self.images, self.seed(piece))
        rows = self.audit.look(self.name, piece, subject, images, prompt=ask.text)
        return [{**row, "kept": row["answer"] == ask.label} for row in rows]

    def figures(self, rows: Rows) -> list[Figure]:
        by_prompt = grouped(rows, "prompt")
        every = [shares(f"… {prompt}", group, "kept", kind="kept") for prompt, group in by_prompt.items()]
        lost = max(every, key=lambda figure: figure.values[BASE].value - figure.values[MODEL].value)
        return [
            shares("Neighbours, seen as asked for", rows, "kept", kind="kept", note=f"Most lost: {lost.name[2:]}."),
            *every,
        ]
