"""Battery: the forgotten prompts and classes themselves, and paraphrases of them."""

from __future__ import annotations

from collections.abc import Sequence

from erasediff.audit.asks import Ask
from erasediff.audit.batteries.base import Battery, NoSettings, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares, where
from erasediff.audit.subject import Subject


class Prompts(Battery[NoSettings]):
    """Share of images of the forgotten prompts, and of paraphrases, in which the concept is seen."""

    name = "prompts"
    order = 1
    title = "Forgotten prompts and paraphrases"
    source = "ESD (Gandikota et al. 2023); paraphrases as in HUB (arXiv 2410.05664)"

    def passes(self) -> float:
        return len(self.pieces()) * self.images * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        asked = [("asked", number) for number in range(len(self.audit.request.forgotten))]
        return [
            {"form": form, "number": number}
            for form, number in (*asked, *(("paraphrase", n) for n in range(len(self.audit.request.paraphrases))))
        ]

    def _ask(self, piece: Piece) -> Ask:
        request = self.audit.request
        return (request.forgotten if piece["form"] == "asked" else request.paraphrases)[piece["number"]]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask = self._ask(piece)
        images = subject.draw([ask] * self.images, self.seed(piece))
        return self.audit.look(self.name, piece, subject, images, prompt=ask.text)

    def figures(self, rows: Rows) -> list[Figure]:
        found = [shares("Asked for, seen", where(rows, form="asked"))]
        if self.audit.request.paraphrases:
            found.append(shares("Paraphrased, seen", where(rows, form="paraphrase")))
        return found
