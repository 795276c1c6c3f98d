"""Battery: images that the base begins and the model completes."""

from __future__ import annotations

from collections.abc import Sequence

from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, grouped, shares
from erasediff.audit.subject import Subject
from erasediff.config.fields import Fraction, Section


class CompletionSettings(Section):
    """Settings of the hand-over.

    Attributes:
        shares: Shares of the sampler's steps that the base takes; published are 5 and 10 of 50.
    """

    shares: tuple[Fraction, ...] = (0.1, 0.2)


class Completion(Battery[CompletionSettings]):
    """Share of images begun by the base in which the concept is seen."""

    name = "completion"
    order = 6
    title = "Completion of what the base begins"
    source = "diffusion completion (Lu et al. 2025, arXiv 2505.17013), here by DDIM on each model's own schedule"
    settings_class = CompletionSettings

    def unfit(self) -> str | None:
        model, base = self.audit.model, self.audit.base
        if model.sample_shape != base.sample_shape:
            return "the samples of model and base differ in shape"
        return None

    def passes(self) -> float:
        return len(self.pieces()) * self.images * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        return [
            {"number": number, "share": share}
            for number in range(len(self.audit.attacked))
            for share in self.settings.shares
        ]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask = self.audit.attacked[piece["number"]]
        until = (self.audit.base, max(1, round(piece["share"] * subject.steps)))
        images = subject.probe(subject.condition([ask] * self.images), self.images, self.seed(piece), until=until)
        return self.audit.look(self.name, piece, subject, images, prompt=ask.text)

    def figures(self, rows: Rows) -> list[Figure]:
        return [
            shares(f"Completed after {share:.0%} of the steps, seen", group)
            for share, group in grouped(rows, "share").items()
        ]
