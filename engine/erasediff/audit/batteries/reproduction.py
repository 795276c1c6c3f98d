"""Battery: images drawn of the captions of images to forget that reproduce them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, means, shares
from erasediff.audit.context import FORGOTTEN
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Section


class ReproductionSettings(Section):
    """Settings of the draws.

    Attributes:
        most_files: Images to forget whose captions are drawn, at most.
        images: Images that are drawn of each.
    """

    most_files: Count = 20
    images: Count = 8


class Reproduction(Battery[ReproductionSettings]):
    """Share of images of the forgotten images' captions that reproduce these."""

    name = "reproduction"
    order = 11
    title = "Reproduced images"
    source = "Carlini et al. 2023, section 4.2: the nearest training image, relative to its own neighbours"
    settings_class = ReproductionSettings
    quick: ClassVar = {"most_files": 4, "images": 4}
    is_judged = False

    def unfit(self) -> str | None:
        return self.audit.lacks_training_images()

    def passes(self) -> float:
        return len(self.pieces()) * self.settings.images * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        count = min(len(self.audit.pictures_of(FORGOTTEN)), self.settings.most_files)
        return [{"file": number} for number in range(count)]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask = self.audit.pictures_of(FORGOTTEN).asks[piece["file"]]
        images = subject.draw([ask] * self.settings.images, self.seed(piece))
        # An unconditional model is not asked for the file: whichever it reproduces counts.
        wanted = None if self.audit.condition == "none" else [piece["file"]] * len(images)
        return self.audit.compare(self.name, {**piece, "set": FORGOTTEN}, subject, images, wanted)

    def figures(self, rows: Rows) -> list[Figure]:
        return [
            shares("Draws that reproduce", rows, kind="reproduced"),
            means("Distance to the nearest image to forget", rows, "distance", kind="distance"),
        ]
