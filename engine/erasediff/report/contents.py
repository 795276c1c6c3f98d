"""What a report tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from erasediff.evaluation import ConditionalMetrics, UnconditionalMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One model of the comparison.

    title:   as in "EraseDiff"
    summary: what was done to it, in a few words
    metrics: of one kind in all columns
    images:  [N, C, H, W] in [-1, 1], from the same seed in all columns
    rows:    int64 [N], the row of the picture that each image belongs to: the class asked for, or the class that the
             judge sees in an unconditional image (no class: negative)
    records: of each step, as in metrics.jsonl; empty where the report shows no curve
    """

    title: str
    summary: str
    metrics: ConditionalMetrics | UnconditionalMetrics
    images: Tensor
    rows: Tensor
    records: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A whole report; ``columns`` are the base, the unlearned model, and then the controls.

    judge_accuracy: on held-out real images, in [0, 1]
    command:        that repeats the run
    settings:       the run's configuration, as YAML
    versions:       of what the numbers may depend on, by name
    """

    columns: Sequence[Column]
    class_names: Sequence[str]
    judge_accuracy: float
    command: str
    settings: str
    versions: Mapping[str, str]

    @property
    def base(self) -> Column:
        return self.columns[0]

    @property
    def unlearned(self) -> Column:
        return self.columns[1]

    @property
    def forget(self) -> tuple[int, ...]:
        return self.unlearned.metrics.forget
