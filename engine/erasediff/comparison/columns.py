"""Columns of the comparison table: label, explanation, and where the number is in a line of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Line = Mapping[str, Any]
Number = float | None


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """Column of the comparison table: one number per method.

    Attributes:
        key: Name in JSON.
        label: Header of the column.
        note: Explanation of the number.
        measurement: Measurement whose lines have the number.
        find: Function of a line's values or cost that returns the number, or None if it is missing.
        shown: Formats the number.
        over_runs: Aggregates the numbers of all runs.
    """

    key: str
    label: str
    note: str
    measurement: str
    find: Callable[[Line], Number]
    shown: Callable[[float], str]
    over_runs: Callable[[Sequence[float]], float] = mean


def _value(name: str) -> Callable[[Line], Number]:
    return lambda line: line["values"].get(name)


def _cost(name: str) -> Callable[[Line], Number]:
    return lambda line: None if line["cost"] is None else line["cost"][name]


def _steps_to_half(line: Line) -> Number:
    return next((float(step) for step, rate in line["values"]["curve"] if rate >= 0.5), math.inf)


def _steps(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _digits(number: float) -> str:
    return f"{number:.3g}"


def _thousandths(number: float) -> str:
    return f"{1000 * number:.1f}"


def _mebibytes(number: float) -> str:
    return f"{number / 2**20:,.2f}" if number < 2**20 else f"{number / 2**20:,.0f}"


def _complement(share: float) -> str:
    return _percent(1 - share)


FORGOTTEN, RETAINED = "forgotten rate", "retained"
"""Keys of the two numbers that the verdict is about; UA is one minus the first."""

COLUMNS: Sequence[Column] = (
    Column(
        key=FORGOTTEN,
        label="UA",
        note="unlearning accuracy: share of images asked for the forgotten class that a classifier of real images does "
        "not take for it; higher is better",
        measurement="quality",
        find=_value("forgotten_rate"),
        shown=_complement,
    ),
    Column(
        key=RETAINED,
        label="RA",
        note="retain accuracy: share of images asked for another class that the classifier takes for it, mean over "
        "classes; higher is better",
        measurement="quality",
        find=_value("retained_mean"),
        shown=_percent,
    ),
    Column(
        key="worst class",
        label="RA worst",
        note="lowest retain accuracy of a class in any run",
        measurement="quality",
        find=_value("retained_worst"),
        shown=_percent,
        over_runs=min,
    ),
    Column(
        key="agreement",
        label="agreement",
        note="cosine similarity of the retained classes' images and their prompts, in features of the classifier "
        "and the text encoder",
        measurement="quality",
        find=_value("agreement_retained"),
        shown=_digits,
    ),
    Column(
        key="FID retained",
        label="FID retained",
        note="Fréchet distance of the retained classes' images from real ones, in the classifier's features",
        measurement="quality",
        find=_value("fid_retained"),
        shown=_digits,
    ),
    Column(
        key="FID all",
        label="FID all",
        note="the same with the forgotten class on both sides, whose images are missed here",
        measurement="quality",
        find=_value("fid_all"),
        shown=_digits,
    ),
    Column(
        key="KID retained",
        label="KID retained",
        note="kernel distance on the same images and features as the Fréchet distance",
        measurement="quality",
        find=_value("kid_retained"),
        shown=_digits,
    ),
    Column(
        key="KID all",
        label="KID all",
        note="with the forgotten class",
        measurement="quality",
        find=_value("kid_all"),
        shown=_digits,
    ),
    Column(
        key="from oracle, retained",
        label="to retrained, retained",
        note="squared MMD x 1000 in a Gaussian kernel from images of the model retrained without the class",
        measurement="quality",
        find=_value("oracle_retained"),
        shown=_thousandths,
    ),
    Column(
        key="from oracle, forgotten",
        label="to retrained, forgotten",
        note="the same on the images asked for the forgotten class",
        measurement="quality",
        find=_value("oracle_forgotten"),
        shown=_thousandths,
    ),
    Column(
        key="steps to relearn",
        label="steps to relearn (median)",
        note="fine-tuning on a few images of the class until the classifier sees it in half of the images asked for; "
        "median over runs, since a run may never get there",
        measurement="relearning",
        find=_steps_to_half,
        shown=_steps,
        over_runs=median,
    ),
    Column(
        key="inverted word",
        label="textual inversion",
        note="share of images in which the classifier sees the class when a learned vector replaces the word (CCE)",
        measurement="inversion",
        find=_value("rate"),
        shown=_percent,
    ),
    Column(
        key="found words",
        label="prompt attack",
        note="the same with three adversarial words before the prompt (after UnlearnDiffAtk)",
        measurement="prompts",
        find=_value("rate"),
        shown=_percent,
    ),
    Column(
        key="CPU s",
        label="CPU s",
        note="processor time of the whole command",
        measurement="quality",
        find=_cost("cpu_seconds"),
        shown=_digits,
    ),
    Column(
        key="wall s",
        label="wall s",
        note="wall-clock time of the whole command, on a machine shared with other work",
        measurement="quality",
        find=_cost("seconds"),
        shown=_digits,
    ),
    Column(
        key="peak MiB",
        label="peak MiB",
        note="peak resident memory of the process, libraries included",
        measurement="quality",
        find=_cost("peak_bytes"),
        shown=_mebibytes,
    ),
    Column(
        key="artefact MiB",
        label="artefact MiB",
        note="size of the mask, the adapter, or the tensors that changed",
        measurement="quality",
        find=_cost("artefact_bytes"),
        shown=_mebibytes,
    ),
)
