"""Figures of a verdict, derived again from what each judge saw in each image, and what follows from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from erasediff.io.json_file import read_object
from erasediff.provenance.faults import Fault, differences
from erasediff.provenance.json_lines import read_lines
from erasediff.provenance.run_files import VERDICT, VERDICT_LINES
from erasediff.verdict.statistics import Estimate, mean, share, share_ratio

Estimates = dict[str, dict[str, Any]]
SIDES = ("before", "after")


def derived_estimates(run: Path) -> Estimates | None:
    """Estimates of ``verdict.json`` that follow from the lines of ``verdict.jsonl``; None for a run without them.

    A line is what a judge saw in an image: ``judge``, ``model`` ("before" or "after"), ``asked`` and ``sees`` (labels),
    ``image`` (its number among those that were asked for alike). UserError for a file that is damaged.
    """
    if not (run / VERDICT).is_file() or not (run / VERDICT_LINES).is_file():
        return None
    verdict = read_object(run / VERDICT)
    sought = set(map(str, _list(verdict.get("sought"))))
    of_judge = DERIVATIONS.get(str(verdict.get("kind")), _of_concepts)
    seen: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in read_lines(run / VERDICT_LINES):
        seen[str(line.get("judge"))].append(line)
    estimates: Estimates = {}
    for judge, lines in sorted(seen.items()):
        for key, sides in of_judge(lines, sought):
            estimates[f"{judge}, {key}"] = {
                side: None if estimate is None else estimate.to_dict()
                for side, estimate in zip(SIDES, sides, strict=True)
            }
    return estimates


def _of_concepts(
    lines: list[Mapping[str, Any]], sought: set[str]
) -> Iterator[tuple[str, tuple[Estimate | None, Estimate]]]:
    """Estimates (before, after) of one judge by the key of their figure."""
    of_sought: dict[str, list[bool]] = {side: [] for side in SIDES}
    of_retained: dict[str, dict[tuple[str, Any], bool]] = {side: {} for side in SIDES}
    for line in lines:
        model, asked, sees = str(line.get("model")), str(line.get("asked")), line.get("sees")
        if model not in SIDES:
            continue
        if asked in sought:
            of_sought[model].append(sees in sought)
        else:
            of_retained[model][asked, line.get("image")] = sees == asked
    before, after = (share(sum(hits), len(hits)) for hits in of_sought.values())
    yield "recognised", (before, after)
    if not of_retained["before"] and not of_retained["after"]:
        return
    before, after = (share(sum(hits.values()), len(hits)) for hits in of_retained.values())
    yield "retained", (before, after)
    drops: defaultdict[str, list[float]] = defaultdict(list)
    for image, was in of_retained["before"].items():
        if image in of_retained["after"]:
            drops[image[0]].append(float(was) - float(of_retained["after"][image]))
    yield "retained_drop", (None, mean([drop for of_label in drops.values() for drop in of_label]))
    yield "worst_drop", (None, max(map(mean, drops.values()), key=lambda estimate: estimate.value, default=mean([])))


def _of_samples(
    lines: list[Mapping[str, Any]], sought: set[str]
) -> Iterator[tuple[str, tuple[Estimate | None, Estimate]]]:
    """Estimates (before, after) of one judge of an unconditional model's samples by the key of their figure."""
    seen = {side: [line.get("sees") for line in lines if line.get("model") == side] for side in SIDES}
    hits = {side: sum(label in sought for label in labels) for side, labels in seen.items()}
    nothing = {side: [label is None for label in labels] for side, labels in seen.items()}
    before, after = (share(hits[side], len(seen[side])) for side in SIDES)
    yield "share", (before, after)
    yield "remaining", (None, share_ratio(hits["after"], hits["before"], len(seen["after"])))
    before, after = (share(sum(nothing[side]), len(nothing[side])) for side in SIDES)
    yield "nothing", (before, after)
    rises = [float(now) - float(was) for was, now in zip(nothing["before"], nothing["after"], strict=False)]
    yield "nothing_rise", (None, mean(rises))


def _of_files(
    lines: list[Mapping[str, Any]], sought: set[str]
) -> Iterator[tuple[str, tuple[Estimate | None, Estimate]]]:
    """Estimates (before, after) of the draws that reproduce a listed file; losses are rounded, and not derived."""
    seen = {side: [line["sees"] for line in lines if line.get("model") == side and "sees" in line] for side in SIDES}
    hits = {side: sum(name is not None for name in names) for side, names in seen.items()}
    if not seen["before"]:
        return
    before, after = (share(hits[side], len(seen[side])) for side in SIDES)
    yield "reproduced", (before, after)
    if hits["before"]:
        yield "reproduced_remaining", (None, share_ratio(hits["after"], hits["before"], len(seen["after"])))


DERIVATIONS = {"concept": _of_concepts, "share": _of_samples, "files": _of_files}
"""By kind of verdict."""
FORGOTTEN_KEYS = {"recognised", "remaining", "reproduced_remaining", "reproduced", "auc_unseen"}
"""Deciding figures of what is forgotten; all others are of what is retained."""


def verdict_faults(run: Path, derived: Estimates) -> Iterator[Fault]:
    """Faults of ``verdict.json``: its estimates against ``derived`` ones, its limits, and what it concludes.

    UserError for a file that is damaged.
    """
    verdict = read_object(run / VERDICT)
    figures = [figure for figure in _list(verdict.get("figures")) if isinstance(figure, Mapping)]
    stated = {f"{figure.get('judge')}, {figure.get('key')}": figure for figure in figures}
    for name, sides in derived.items():
        figure = stated.get(name, {})
        yield from differences(f"{VERDICT}, {name}", {side: figure.get(side) for side in SIDES}, sides)
    for name, figure in stated.items():
        yield from differences(f"{VERDICT}, {name}, is_met", figure.get("is_met"), _is_met(figure))
    deciding = [(figure.get("key"), _is_met(figure)) for figure in figures if figure.get("decides") is True]
    of_forgotten = [is_met for key, is_met in deciding if key in FORGOTTEN_KEYS]
    of_retained = [is_met for key, is_met in deciding if key not in FORGOTTEN_KEYS]
    forgot, kept = (bool(side) and all(side) for side in (of_forgotten, of_retained))
    # What cannot be told need not be: a control may have failed.
    for key, good, bad, holds in (
        ("forgotten", "forgotten", "not forgotten", forgot),
        ("retained", "retained", "damaged", kept),
    ):
        outcome = good if holds else bad
        if verdict.get(key) not in (outcome, "cannot tell"):
            yield Fault(f"{VERDICT}, {key}", str(verdict.get(key)), outcome)
    yield from differences(f"{VERDICT}, verdict", verdict.get("verdict"), _sentence(verdict))


def _is_met(figure: Mapping[str, Any]) -> bool | None:
    """Whether the estimate of a figure is within its limit; None without one."""
    relation, limit = figure.get("relation"), figure.get("limit")
    if relation not in ("at most", "at least") or not isinstance(limit, int | float):
        return None
    after = figure.get("after")
    value = after.get(str(figure.get("compared"))) if isinstance(after, Mapping) else None
    if not isinstance(value, int | float):
        return False
    slack = 1e-9
    return value <= limit + slack if relation == "at most" else value >= limit - slack


def _sentence(verdict: Mapping[str, Any]) -> str:
    forgotten, retained = verdict.get("forgotten"), verdict.get("retained")
    first = "cannot tell whether it is forgotten" if forgotten == "cannot tell" else str(forgotten)
    unknown = retained == "cannot tell"
    return f"{first}, {'cannot tell whether the rest is retained' if unknown else f'the rest {retained}'}"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
