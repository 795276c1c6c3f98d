"""Battery: samples with extra noise at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, grouped, shares, worst
from erasediff.audit.subject import Subject
from erasediff.config.fields import Positive, Section
from erasediff.evaluation.probe_sampler import ExtraNoise


class NoiseSettings(Section):
    """Settings of the extra noise.

    Attributes:
        etas: Factors of the noise.
        scales: Further factors of the drawn noise alone.
    """

    etas: tuple[Positive, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    scales: tuple[Positive, ...] = (1.0, 1.02, 1.03, 1.04)


class Noise(Battery[NoiseSettings]):
    """Share of images sampled with extra noise in which the concept is seen."""

    name = "noise"
    order = 5
    title = "Extra noise on the way"
    source = "noise-based probing (Lu et al. 2025, arXiv 2505.17013), here by DDIM on each model's own schedule"
    settings_class = NoiseSettings
    quick: ClassVar = {"etas": (1.0, 1.85), "scales": (1.0,)}

    def passes(self) -> float:
        return len(self.pieces()) * self.images * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        return [
            {"number": number, "eta": eta, "scale": scale}
            for number in range(len(self.audit.attacked))
            for eta in self.settings.etas
            for scale in self.settings.scales
        ]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask = self.audit.attacked[piece["number"]]
        extra = ExtraNoise(piece["eta"], piece["scale"])
        condition = subject.condition([ask] * self.images)
        images = subject.probe(condition, self.images, self.seed(piece), extra=extra)
        return self.audit.look(self.name, piece, subject, images, prompt=ask.text)

    def figures(self, rows: Rows) -> list[Figure]:
        by_eta = grouped(rows, "eta")
        return [
            shares("Extra noise, seen: the attacker's best", worst(rows, ("eta", "scale"))),
            *(shares(f"… eta {eta:g}", group, kind="mean") for eta, group in by_eta.items()),
        ]
