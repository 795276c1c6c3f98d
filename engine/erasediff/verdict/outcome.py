"""Outcome of a verdict: figures with their limits, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from erasediff.verdict.statistics import Estimate

Forgotten = Literal["forgotten", "not forgotten", "cannot tell"]
Retained = Literal["retained", "damaged", "cannot tell"]
Relation = Literal["at most", "at least"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A quantity of a verdict.

    Attributes:
        key: Name in JSON.
        title: Name for readers.
        judge: Name of the judge that it is from; None for one of the models themselves.
        before: Estimate for the original model; None where the figure compares the two.
        after: Estimate for the unlearned model, or of the difference.
        relation: What ``after`` is to be to ``limit``; None for a figure without a limit.
        limit: See ``relation``.
        compared: Part of ``after`` that the limit is for: an end of the interval where chance could explain the value.
        decides: The verdict depends on it.
    """

    key: str
    title: str
    judge: str | None = None
    before: Estimate | None = None
    after: Estimate
    relation: Relation | None = None
    limit: float | None = None
    compared: Literal["value", "low", "high"] = "value"
    decides: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether the estimate is within the limit, None without one; false for an estimate of nothing."""
        if self.relation is None or self.limit is None:
            return None
        if math.isnan(self.after.value):
            return False
        value = float(getattr(self.after, self.compared))
        # Shares are quotients of counts: a limit that is just reached is met.
        slack = 1e-9
        return value <= self.limit + slack if self.relation == "at most" else value >= self.limit - slack

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "key": self.key,
            "title": self.title,
            "judge": self.judge,
            "before": None if self.before is None else self.before.to_dict(),
            "after": self.after.to_dict(),
            "relation": self.relation,
            "limit": self.limit,
            "compared": self.compared,
            "is_met": self.is_met,
            "decides": self.decides,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Verdict of a run.

    Attributes:
        forgotten: Whether the model has forgotten what it was asked to.
        retained: Whether it has kept the rest.
        reasons: A sentence for each outcome that is not "forgotten" or "retained".
        kind: What was asked for: "concept" (captions or classes), "share" (of an unconditional model), "files".
        sought: What should be forgotten, by label.
        others: What the judges chose among besides.
        figures: Figures, those that decide first.
        judges: Name and description of each judge, the one that decides first.
        settings: Facts that a reader needs in order to repeat it.
    """

    forgotten: Forgotten
    retained: Retained
    kind: str
    reasons: Sequence[str] = ()
    sought: Sequence[str] = ()
    others: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    judges: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Forgotten and retained."""
        return self.forgotten == "forgotten" and self.retained == "retained"

    @property
    def sentence(self) -> str:
        """The verdict in one line, such as "forgotten, retained"."""
        parts = [
            "cannot tell whether it is forgotten" if self.forgotten == "cannot tell" else self.forgotten,
            "cannot tell whether the rest is retained"
            if self.retained == "cannot tell"
            else f"the rest {self.retained}",
        ]
        return ", ".join(parts)

    @property
    def failed_name(self) -> str:
        """Name of a model that did not pass."""
        if self.forgotten == "not forgotten":
            return NOT_FORGOTTEN
        return DAMAGED if self.retained == "damaged" else UNPROVEN

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON."""
        return {
            "verdict": self.sentence,
            "forgotten": self.forgotten,
            "retained": self.retained,
            "reasons": list(self.reasons),
            "kind": self.kind,
            "sought": list(self.sought),
            "others": list(self.others),
            "figures": [figure.to_dict() for figure in self.figures],
            "judges": [dict(judge) for judge in self.judges],
            "settings": dict(self.settings),
        }


NOT_FORGOTTEN, DAMAGED, UNPROVEN = "model-not-forgotten", "model-damaged", "model-unproven"
"""Names, in a run's folder, of models that did not pass."""
