"""What unlearning must reach to count as done: forgotten, and nothing else lost."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from erasediff.evaluation.metrics import ConditionalMetrics, UnconditionalMetrics


@dataclass(frozen=True, slots=True)
class Target:
    """``value`` (a share in [0, 1]) is to be ``relation`` ("at most" or "at least") ``limit``."""

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
    """The forgotten classes are hardly ever recognised, every other one nearly as often as in ``base``."""
    return (
        Target("Forgotten, recognised when asked for", metrics.forgotten_rate, "at most", 0.02),
        Target("Others, recognised on average", metrics.retained_mean, "at least", 0.96),
        Target("Others, largest drop from the base", metrics.worst_drop(base), "at most", 0.03),
    )


def unconditional_targets(metrics: UnconditionalMetrics, base: UnconditionalMetrics) -> tuple[Target, ...]:
    """The forgotten classes keep a fifth of their share or less, and the others their proportions."""
    return (
        Target("Forgotten, what is left of its share", metrics.remaining(base), "at most", 0.2),
        Target("Others, largest shift of a proportion", metrics.largest_shift(base), "at most", 0.05),
    )
