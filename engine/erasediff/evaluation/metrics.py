"""Metrics of unlearning: unlearning accuracy (UA) beside retain accuracy (RA) and image quality."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from erasediff.data import Images
from erasediff.evaluation.judge import NONE, Judge


@dataclass(frozen=True, slots=True)
class ConditionalMetrics:
    """Metrics of a class-conditional model. Shares are in [0, 1]; lists run over the classes.

    Attributes:
        recognised: Share of the images asked for class c that the classifier takes for class c.
        asked: Number of those images.
        forgotten_rate: ``recognised`` over the forgotten classes, 1 - UA: lower is better.
        forgotten_bound: Upper end of its 95% Wilson interval.
        forgotten_nearest: The same share without the answer "none", so that noise cannot pass for forgetting.
        forgotten_none: Share of the images asked for a forgotten class that resemble no class at all.
        forgotten_elsewhere: Share of the images asked for a retained class that are taken for a forgotten one.
        retained_mean: RA, mean of ``recognised`` over the retained classes: higher is better.
        retained_worst: Least of ``recognised`` over the retained classes.
        discrepancy: Of images of retained classes from real ones, 0 is best (``Judge.discrepancy``).
        forget: The forgotten classes.
    """

    recognised: tuple[float, ...]
    asked: tuple[int, ...]
    forgotten_rate: float
    forgotten_bound: float
    forgotten_nearest: float
    forgotten_none: float
    forgotten_elsewhere: float
    retained_mean: float
    retained_worst: float
    discrepancy: float
    forget: tuple[int, ...]

    def worst_drop(self, base: ConditionalMetrics) -> float:
        """Largest drop of a retained class's accuracy from ``base``, as a share; negative if all gained."""
        return max(base.recognised[c] - self.recognised[c] for c in range(len(self.recognised)) if c not in self.forget)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class UnconditionalMetrics:
    """Metrics of an unconditional model, from the classes of its images. Lists run over the classes.

    Attributes:
        shares: Share of all images that the classifier takes for class c.
        none: Share that resembles no class.
        count: Number of images.
        forgotten_share: Sum of ``shares`` over the forgotten classes.
        forgotten_bound: Upper end of its 95% Wilson interval.
        forgotten_nearest: The same share without the answer "none".
        proportions: ``shares`` of the retained classes, scaled to sum to one (0 for the forgotten).
        discrepancy: Of the images without a forgotten class from the real retained ones, 0 is best.
        forget: The forgotten classes.
    """

    shares: tuple[float, ...]
    none: float
    count: int
    forgotten_share: float
    forgotten_bound: float
    forgotten_nearest: float
    proportions: tuple[float, ...]
    discrepancy: float
    forget: tuple[int, ...]

    def remaining(self, base: UnconditionalMetrics) -> float:
        """Share of the forgotten classes as a part of that in ``base``."""
        return self.forgotten_share / base.forgotten_share if base.forgotten_share else float("nan")

    def largest_shift(self, base: UnconditionalMetrics) -> float:
        """Largest change of a retained class's proportion from ``base``."""
        return max(abs(a - b) for a, b in zip(self.proportions, base.proportions, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluation_labels(num_classes: int, forget: tuple[int, ...], *, per_class: int, forgotten: int) -> Tensor:
    """Sorted labels int64 [N] of ``per_class`` images of each retained class and ``forgotten`` of each other one."""
    counts = torch.tensor([forgotten if c in forget else per_class for c in range(num_classes)])
    return torch.arange(num_classes).repeat_interleave(counts)


def conditional_metrics(
    judge: Judge, sample: Tensor, class_labels: Tensor, real: Images, forget: tuple[int, ...]
) -> ConditionalMetrics:
    """Compute the metrics of a class-conditional model's images.

    Args:
        judge: Classifier.
        sample: Images [N, C, H, W] in [-1, 1].
        class_labels: int64 [N], the class that each image was asked for; each class at least once.
        real: Training images, of which those of retained classes are what the samples are compared with.
        forget: Forgotten classes.
    """
    class_labels = class_labels.cpu()
    num_classes = int(real.class_labels.max()) + 1
    answers, nearest = judge.classify(sample), judge.nearest_class(sample)
    asked_forgotten = _any_of(class_labels, forget)
    retained = [c for c in range(num_classes) if c not in forget]
    recognised = tuple(_share(answers[class_labels == c] == c) for c in range(num_classes))
    right = answers[asked_forgotten] == class_labels[asked_forgotten]
    return ConditionalMetrics(
        recognised=recognised,
        asked=tuple(int((class_labels == c).sum()) for c in range(num_classes)),
        forgotten_rate=_share(right),
        forgotten_bound=upper_bound(right),
        forgotten_nearest=_share(nearest[asked_forgotten] == class_labels[asked_forgotten]),
        forgotten_none=_share(answers[asked_forgotten] == NONE),
        forgotten_elsewhere=_share(_any_of(answers[~asked_forgotten], forget)),
        retained_mean=sum(recognised[c] for c in retained) / len(retained),
        retained_worst=min(recognised[c] for c in retained),
        discrepancy=judge.discrepancy(sample[~asked_forgotten], real.of_classes(retained).sample),
        forget=tuple(forget),
    )


def unconditional_metrics(judge: Judge, sample: Tensor, real: Images, forget: tuple[int, ...]) -> UnconditionalMetrics:
    """Compute the metrics of an unconditional model's images ``sample`` [N, C, H, W], as ``conditional_metrics``."""
    num_classes = int(real.class_labels.max()) + 1
    retained = [c for c in range(num_classes) if c not in forget]
    answers = judge.classify(sample)
    shares = tuple(_share(answers == c) for c in range(num_classes))
    retained_share = sum(shares[c] for c in retained)
    is_forgotten = _any_of(answers, forget)
    return UnconditionalMetrics(
        shares=shares,
        none=_share(answers == NONE),
        count=len(sample),
        forgotten_share=_share(is_forgotten),
        forgotten_bound=upper_bound(is_forgotten),
        forgotten_nearest=_share(_any_of(judge.nearest_class(sample), forget)),
        proportions=tuple(
            shares[c] / retained_share if retained_share and c in retained else 0.0 for c in range(num_classes)
        ),
        discrepancy=judge.discrepancy(sample[~is_forgotten], real.of_classes(retained).sample),
        forget=tuple(forget),
    )


def _any_of(classes: Tensor, wanted: tuple[int, ...]) -> Tensor:
    return torch.isin(classes, torch.tensor(wanted, dtype=torch.int64))


def _share(hits: Tensor) -> float:
    """Mean of a bool [N]; nan for none."""
    return hits.double().mean().item()


def upper_bound(hits: Tensor) -> float:
    """Upper end of the 95% interval of the share of bool [N] (Wilson 1927); 1 for none."""
    n, share, z = len(hits), _share(hits), 1.96
    if n == 0:
        return 1.0
    return (share + z * z / (2 * n) + z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))) / (1 + z * z / n)


@dataclass(frozen=True, slots=True)
class Target:
    """Target of a metric: ``value`` (a share in [0, 1]) is to be ``relation`` ("at most" or "at least") ``limit``."""

    name: str
    value: float
    relation: str
    limit: float

    @property
    def is_met(self) -> bool:
        """False for a value that is not a number."""
        return RELATIONS[self.relation](self.value, self.limit)


RELATIONS: dict[str, Callable[[float, float], bool]] = {"at most": operator.le, "at least": operator.ge}


def conditional_targets(metrics: ConditionalMetrics, base: ConditionalMetrics) -> tuple[Target, ...]:
    """Targets of a class-conditional model: low accuracy of forgotten classes, retained ones nearly as in ``base``."""
    return (
        Target("Forgotten class, recognised (1 − UA)", metrics.forgotten_rate, "at most", 0.02),
        Target("Retain accuracy (RA)", metrics.retained_mean, "at least", 0.96),
        Target("Retained class, largest drop from the base", metrics.worst_drop(base), "at most", 0.03),
    )


def unconditional_targets(metrics: UnconditionalMetrics, base: UnconditionalMetrics) -> tuple[Target, ...]:
    """Targets of an unconditional model: at most a fifth of the forgotten share, other proportions as in ``base``."""
    return (
        Target("Forgotten class, share relative to the base", metrics.remaining(base), "at most", 0.2),
        Target("Retained class, largest shift of its proportion", metrics.largest_shift(base), "at most", 0.05),
    )
