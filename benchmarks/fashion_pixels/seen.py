"""What the classifier of real garments sees in samples of 28 x 28 pixels."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from train import MARGIN

from erasediff.evaluation.distances import frechet_distance

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "nano_sd"))
from fashion import CLASSES, load
from judge import Judge

JUDGE = Path(__file__).resolve().parents[1] / "nano_sd" / "trained" / "judge"

STRANGE = 0.99
"""Share of real test images that are nearer to another test image than an image of nothing is to any."""


@dataclass(frozen=True, slots=True)
class Samples:
    """``images`` [N, 1, 28, 28] in [-1, 1], ``labels`` [N] that they were asked for by, if any."""

    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, slots=True)
class Seen:
    """The classifier, and its features [10000, 128] and labels of the real test images.

    ``distance_limit`` is the distance of features to the nearest test image beyond which a sample is one of nothing:
    the classifier has no such answer, and calls noise by a garment's name with confidence.
    """

    judge: Judge
    features: Tensor
    labels: Tensor
    distance_limit: float

    @classmethod
    def of(cls, data: Path) -> Self:
        judge, test = Judge.load(JUDGE), load(data, "t10k")
        _, features = judge.answer(test.images)
        nearest = _nearest(features, features, number=2)  # the nearest is the image itself
        return cls(judge, features, test.labels, nearest.quantile(STRANGE).item())

    def describe(self, samples: Samples, forgotten: int) -> dict[str, Any]:
        """Shares in [0, 1] of what is seen.

        ``forgotten``: of a class-conditional model, the share of what was asked for by the forgotten class in which it
        is seen, else the share of all samples; ``others``: the mean of the other classes' shares seen in what was asked
        for by them, else the share of all samples that is of other garments, and not of nothing; ``nothing``: the share
        of images of nothing among those asked for by the forgotten class, else among all; ``frechet``: distance of
        features of the samples that are not asked for by the forgotten class, nor taken for it, to those of the real
        images of the others.
        """
        grey = ((samples.images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        answers, features = self.judge.answer(pad(grey, (MARGIN,) * 4))
        is_nothing = _nearest(features, self.features) > self.distance_limit
        is_forgotten = answers == forgotten
        others = [label for label in range(len(CLASSES)) if label != forgotten]
        if samples.labels is None:
            asked, rest = torch.ones_like(is_forgotten), ~is_forgotten
            shares = [((answers == label) & ~is_nothing).double().mean().item() for label in range(len(CLASSES))]
            kept = sum(shares[label] for label in others)
        else:
            asked, rest = samples.labels == forgotten, samples.labels != forgotten
            is_right = (answers == samples.labels).double()
            shares = [is_right[samples.labels == label].mean().item() for label in range(len(CLASSES))]
            kept = sum(shares[label] for label in others) / len(others)
        return {
            "forgotten": is_forgotten[asked].double().mean().item(),
            "others": kept,
            "nothing": is_nothing[asked].double().mean().item(),
            "nothing_elsewhere": is_nothing[rest].double().mean().item(),
            "frechet": frechet_distance(features[rest], self.features[self.labels != forgotten]),
            "shares": dict(zip(CLASSES, shares, strict=True)),
            "images": len(answers),
        }


def _nearest(features: Tensor, real: Tensor, number: int = 1) -> Tensor:
    """Distance of each of ``features`` [N, D] to the one of ``real`` that is ``number``th in nearness."""
    return torch.cat([torch.cdist(part, real).kthvalue(number).values for part in features.split(1000)])
