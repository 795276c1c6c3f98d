"""Battery: the middle of images of the concept, drawn again."""

from __future__ import annotations

from collections.abc import Sequence

from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, shares
from erasediff.audit.context import centre_mask
from erasediff.audit.subject import Subject
from erasediff.config.fields import Section, Share


class InPaintingSettings(Section):
    """Settings of the mask.

    Attributes:
        side: Share of each side that the masked square takes; published are 256 of 512 pixels.
    """

    side: Share = 0.5


class InPainting(Battery[InPaintingSettings]):
    """Share of images of the concept, redrawn in the middle, in which it is seen."""

    name = "in-painting"
    order = 8
    title = "In-painting of images of the concept"
    source = "in-painting probe (Lu et al. 2025, arXiv 2505.17013) by blended latents (Avrahami et al. 2022)"
    settings_class = InPaintingSettings

    def passes(self) -> float:
        return len(self.pieces()) * self.images * self.audit.model.passes_per_image

    def pieces(self) -> Sequence[Piece]:
        return [{"number": number} for number in range(len(self.audit.attacked))]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        ask, pictures = self.audit.attacked[piece["number"]], self.audit.concept_images
        rows = [number % len(pictures) for number in range(self.images)]
        mask = centre_mask(subject.sample_shape, self.settings.side, subject.model.device)
        images = subject.probe(
            subject.condition([ask] * self.images),
            self.images,
            self.seed(piece),
            given=(subject.encode(pictures.pixels[rows]), mask),
        )
        return self.audit.look(self.name, piece, subject, images, prompt=ask.text)

    def figures(self, rows: Rows) -> list[Figure]:
        note = "What was not masked counts too: compare with the base."
        return [shares("Middle redrawn, seen", rows, kind="given", note=note)]
