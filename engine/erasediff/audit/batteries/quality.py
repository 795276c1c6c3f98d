"""Battery: quality of retained images: distances from real ones and from the base's, and CLIP score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from erasediff.audit.asks import Ask
from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, means
from erasediff.audit.context import RETAINED, repeated
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Section
from erasediff.errors import UserError
from erasediff.evaluation.distances import frechet_distance, kernel_distance
from erasediff.verdict.judges.clip import ClipJudge
from erasediff.verdict.judges.pictures import pictures

LEAST = 8
"""Real images, without which no distance is told."""


class QualitySettings(Section):
    """Settings of the samples.

    Attributes:
        blocks: Blocks of images; figures are means over them, as KID's are.
        block_images: Images of each block.
        clip: Folder of a CLIP or SigLIP for the CLIP score; None for none.
        lpips: Backbone of LPIPS by torchmetrics (the extra "audit", with torchvision and its weights); None for none.
    """

    blocks: Count = 10
    block_images: Count = 100
    clip: Path | None = None
    lpips: Literal["alex", "vgg", "squeeze"] | None = None


class Quality(Battery[QualitySettings]):
    """Fréchet and kernel distance of retained images from real ones, drift from the base's, and CLIP score."""

    name = "quality"
    order = 13
    title = "Quality of what is retained"
    source = (
        "Fréchet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), CLIP score (Hessel et al. "
        "2021), LPIPS (Zhang et al. 2018)"
    )
    settings_class = QualitySettings
    quick: ClassVar = {"blocks": 2, "block_images": 32}
    is_judged = False

    def unfit(self) -> str | None:
        if not self._asks:
            return "there are no retained prompts or classes"
        if len(self.audit.pictures_of(RETAINED)) < LEAST:
            return f"it needs {LEAST} images to retain: give --data"
        return None

    @property
    def _asks(self) -> Sequence[Ask]:
        return self.audit.request.retained or ((Ask(""),) if self.audit.condition == "none" else ())

    @cached_property
    def _real(self) -> Tensor:
        return self.audit.features(self.audit.pictures_of(RETAINED).pixels)

    @cached_property
    def _clip(self) -> ClipJudge | None:
        clip = self.settings.clip
        return None if clip is None or self.audit.condition == "none" else ClipJudge(clip, self.audit.base.model.device)

    def passes(self) -> float:
        images = self.settings.blocks * self.settings.block_images
        # The base draws beside every subject, itself included.
        return images * self.audit.model.passes_per_image * 2

    def pieces(self) -> Sequence[Piece]:
        return [{"block": block} for block in range(self.settings.blocks)]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        asks = repeated(self._asks, self.settings.block_images)
        images = subject.draw(asks, self.seed(piece))
        others = images if subject is self.audit.base else self.audit.base.draw(asks, self.seed(piece))
        features, theirs = self.audit.features(images), self.audit.features(others)
        ours, centre = features - self._real.mean(0), self._real.mean(0)
        row: dict[str, Any] = {
            **piece,
            "frechet": frechet_distance(features, self._real),
            "kernel": kernel_distance(features, self._real),
            "agreement": torch.nn.functional.cosine_similarity(ours, theirs - centre).mean().item(),
        }
        if self._clip is not None:
            row["clip"] = _clip_score(self._clip, images, asks)
        if self.settings.lpips is not None:
            row["lpips"] = _lpips(images, others, self.settings.lpips)
        return [row]

    def figures(self, rows: Rows) -> list[Figure]:
        name, count = self.audit.features.name, self.settings.block_images
        note = f"A mean over blocks of {count} images, against {len(self._real)} real ones; not comparable elsewhere."
        found = [
            means(f"Fréchet distance in {name} features", rows, "frechet", kind="distance", note=note),
            means(f"Kernel distance in {name} features", rows, "kernel", kind="distance", note=note),
            means(
                f"Agreement with the base's images in {name} features",
                rows,
                "agreement",
                note="Cosine of images of the same seed: 1 for the same images.",
            ),
        ]
        if self._clip is not None:
            found.append(means("CLIP score", rows, "clip", note="100 times the cosine of image and prompt."))
        if self.settings.lpips is not None:
            found.append(means("LPIPS from the base's images", rows, "lpips", kind="distance"))
        return found

    def description(self) -> Mapping[str, Any]:
        facts = {"features": self.audit.features.name, **self.audit.features.description}
        return facts if self._clip is None else {**facts, "clip": self._clip.description}


@torch.no_grad()
def _clip_score(clip: ClipJudge, images: Tensor, asks: Sequence[Ask]) -> float:
    """Mean over images of 100 max(cos(image, prompt), 0)."""
    tokens = clip.tokenizer([ask.text for ask in asks], padding="max_length", truncation=True, return_tensors="pt")
    pixels = clip.processor(images=pictures(images), return_tensors="pt")["pixel_values"]
    output = clip.model(**tokens.to(clip.device), pixel_values=pixels.to(clip.device))
    cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    return float(100 * cosine.clamp(min=0).mean())


def _lpips(images: Tensor, others: Tensor, backbone: Literal["alex", "vgg", "squeeze"]) -> float:
    """Mean LPIPS of pairs of images uint8 [N, 3, H, W]. UserError without the packages."""
    first, second = (part.float() / 127.5 - 1 for part in (images, others))
    try:
        from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

        return float(learned_perceptual_image_patch_similarity(first, second, net_type=backbone))
    except ImportError:
        raise UserError("LPIPS needs torchmetrics and torchvision: install erasediff[audit], or omit lpips.") from None
