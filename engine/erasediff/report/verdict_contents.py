"""Contents of the report of an unlearning run: verdict, figures, pictures before and after, judges, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from erasediff.verdict.statistics import Estimate

Outcome = Literal["passed", "failed", "undecided"]
"""Forgotten and retained; not so; or a judge that cannot tell."""
Kind = Literal["share", "number"]
"""Shares are shown in per cent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """Row of the table of figures.

    Attributes:
        title: Title, as in "Images that show a coat".
        note: Explanation for a newcomer; may be empty.
        kind: Unit that the values are shown in.
        before: Estimate of the original model; None where there is none.
        after: Estimate of the unlearned model.
        relation: Relation to the limit, "at most" or "at least".
        limit: Limit of the estimate or, where the verdict says so, of an end of its interval; None for no limit.
        is_met: Whether the limit is met; None where it cannot be told or there is none.
    """

    title: str
    note: str = ""
    kind: Kind = "share"
    before: Estimate | None = None
    after: Estimate
    relation: Literal["at most", "at least"] = "at most"
    limit: float | None = None
    is_met: bool | None = None


@dataclass(frozen=True, slots=True)
class PictureRow:
    """Pictures of one prompt or class.

    Attributes:
        label: The prompt or class.
        before: uint8 [N, 3, H, W], drawn by the original model.
        after: The same seeds, drawn by the unlearned model.
    """

    label: str
    before: Tensor
    after: Tensor


@dataclass(frozen=True, slots=True)
class PictureGroup:
    """Pictures of the prompts of one role.

    Attributes:
        title: Title, as in "Forgotten", "Neighbours" or "Retained".
        rows: A row for each prompt.
        note: Explanation; may be empty.
    """

    title: str
    rows: Sequence[PictureRow]
    note: str = ""


@dataclass(frozen=True, slots=True)
class JudgeRow:
    """Judge of the verdict.

    Attributes:
        name: Name of the judge.
        description: Facts to repeat it by (``Judge.description``).
        control: Its control figure: the share of the original model's images that it recognises.
    """

    name: str
    description: Mapping[str, Any]
    control: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictContents:
    """Contents of the report of one run.

    Attributes:
        title: What the run was to forget, as in "coat"; the page is called "Forgetting coat".
        verdict: The verdict in one sentence.
        outcome: Outcome, which chooses colour and icon.
        figures: Figures with their limits.
        pictures: Groups of pictures, those of forgotten prompts first.
        judges: Judges that the figures are by.
        records: Records of each step, as in metrics.jsonl; empty for no curves.
        command: Command that repeats the run.
        settings: The run's configuration, as YAML.
        versions: Versions of libraries, by name.
        notes: Sentences about what limits the verdict.
    """

    title: str
    verdict: str
    outcome: Outcome
    figures: Sequence[FigureRow]
    pictures: Sequence[PictureGroup] = ()
    judges: Sequence[JudgeRow] = ()
    records: Sequence[Mapping[str, Any]] = ()
    command: str
    settings: str
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def value_text(value: float | None, kind: Kind) -> str:
    """Format a value: a share in per cent, a number in three digits, a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return (f"{100 * value:.1f}%" if kind == "share" else f"{value:.3g}").replace("-", "−")


def interval_text(estimate: Estimate, kind: Kind) -> str:
    """Format the 95% interval: "1.2% to 4.5%"."""
    return f"{value_text(estimate.low, kind)} to {value_text(estimate.high, kind)}"


def limit_text(row: FigureRow) -> str:
    """Format the limit: "at most 3%"; a dash for none."""
    if row.limit is None:
        return "–"
    limit = f"{100 * row.limit:.4g}%" if row.kind == "share" else f"{row.limit:.4g}"
    return f"{row.relation} {limit}".replace("-", "−")


def description_text(judge: JudgeRow) -> str:
    """Description of a judge as indented JSON."""
    return json.dumps(judge.description, indent=2, ensure_ascii=False, default=str)
