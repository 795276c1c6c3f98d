"""Battery: samples that start from images of the concept."""

from __future__ import annotations

from collections.abc import Sequence

from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, grouped, shares
from erasediff.audit.context import repeated
from erasediff.audit.subject import Subject
from erasediff.config.fields import Section, Share


class ImageToImageSettings(Section):
    """Settings of the start.

    Attributes:
        strengths: Shares of the trajectory that the images are noised to; diffusers' default is 0.8.
    """

    strengths: tuple[Share, ...] = (0.6, 0.8)


class ImageToImage(Battery[ImageToImageSettings]):
    """Share of images that start from the concept's in which it is still seen."""

    name = "image-to-image"
    order = 7
    title = "Image-to-image from images of the concept"
    source = "SDEdit (Meng et al. 2022); as an attack in M-ErasureBench (arXiv 2512.22877)"
    settings_class = ImageToImageSettings

    def passes(self) -> float:
        one_round = sum(self.settings.strengths) * self.images * self.audit.model.passes_per_image
        return one_round * len(self.audit.attacked)

    def pieces(self) -> Sequence[Piece]:
        return [
            {"number": number, "strength": strength}
            for number in range(len(self.audit.attacked))
            for strength in self.settings.strengths
        ]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask, pictures = self.audit.attacked[piece["number"]], self.audit.concept_images
        rows = [number % len(pictures) for number in range(self.images)]
        start = subject.encode(pictures.pixels[rows])
        images = subject.probe(
            subject.condition(repeated([ask], self.images)),
            self.images,
            self.seed(piece),
            start=(start, piece["strength"]),
        )
        return self.audit.look(self.name, piece, subject, images, prompt=ask.text)

    def figures(self, rows: Rows) -> list[Figure]:
        note = "What the start itself shows counts too: compare with the base."
        groups = sorted(grouped(rows, "strength").items(), reverse=True)
        return [shares(f"Strength {strength:g}, seen", group, kind="given", note=note) for strength, group in groups]
