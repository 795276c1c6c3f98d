"""HTML page of an audit: figures with intervals beside their controls, and pictures of the worst cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from erasediff.audit.battery_outcome import BASE, MODEL, BatteryOutcome, Figure, worst_recovery
from erasediff.io.atomic import atomic_write
from erasediff.io.jsonl import dumps
from erasediff.report.render import data_url, template_environment

SHOWN = 8
"""Pictures of each battery and subject."""
WIDEST = 256
"""Pixels of the longer side of a picture on the page."""
SHARES = frozenset({"recovered", "reproduced", "relearned", "kept", "given", "control", "mean", "share"})
"""Kinds of figures that are shares."""
TITLES = {MODEL: "Audited model", BASE: "Base", "reference": "Reference"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditContents:
    """Contents of an audit's page.

    Attributes:
        outcomes: Of each battery.
        facts: Models, judge, request and sampling (JSON).
        command: Command that repeats the audit.
        versions: Versions of libraries, by name.
        folder: Where the pictures are.
    """

    outcomes: Sequence[BatteryOutcome]
    facts: Mapping[str, Any]
    command: str
    versions: Mapping[str, str]
    folder: Path


def write_audit_page(path: Path, contents: AuditContents) -> None:
    """Write the page to ``path``: one self-contained file. UserError if the disk refuses."""
    measured = [outcome for outcome in contents.outcomes if outcome.refusal is None]
    worst = worst_recovery(measured)
    page = (
        template_environment()
        .get_template("audit.html.j2")
        .render(
            facts=contents.facts,
            forgotten=", ".join(contents.facts["concepts"]) or f"{contents.facts['images']['forgotten']} images",
            worst=None if worst is None else _card(*worst, contents.facts["limit"]),
            batteries=[_section(outcome, contents.folder) for outcome in measured],
            refused=[outcome for outcome in contents.outcomes if outcome.refusal is not None],
            command=contents.command,
            details=dumps(contents.facts, indent=2),
            versions=contents.versions,
        )
    )
    atomic_write(path, page)


def _card(battery: str, figure: Figure, limit: float | None) -> dict[str, str]:
    """The worst case, "met" or "missed" where there is a limit."""
    is_met = None if limit is None else figure.values[MODEL].value <= limit
    return {
        "battery": battery,
        "name": figure.name,
        "value": shown(figure, MODEL),
        "base": shown(figure, BASE),
        "limit": "" if limit is None else f"; at most {limit:.1%} allowed",
        "class": {None: "", True: "met", False: "missed"}[is_met],
    }


def _section(outcome: BatteryOutcome, folder: Path) -> dict[str, Any]:
    subjects = list(outcome.rows)
    return {
        "outcome": outcome,
        "subjects": [TITLES[subject] for subject in subjects],
        "figures": [(figure, [shown(figure, subject) for subject in subjects]) for figure in outcome.figures],
        "pictures": [
            (TITLES[subject], pictures)
            for subject in subjects
            if (pictures := _pictures(outcome.rows[subject], folder))
        ],
        "settings": dumps({**outcome.settings, **outcome.description}, indent=2),
    }


def shown(figure: Figure, subject: str) -> str:
    """Estimate of a subject with its interval and number, as text."""
    estimate = figure.values.get(subject)
    if estimate is None or not estimate.count:
        return "–"
    values = [_number(value, figure) for value in (estimate.value, estimate.low, estimate.high)]
    if estimate.low == estimate.high or not math.isfinite(estimate.high - estimate.low):
        return f"{values[0]} (n = {estimate.count})"
    return f"{values[0]} [{values[1]}, {values[2]}] (n = {estimate.count})"


def _number(value: float, figure: Figure) -> str:
    return f"{100 * value:.1f}%" if figure.kind in SHARES else f"{value:.4g}"


def _pictures(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Pictures of the worst rows: those that show what should be forgotten, before others."""
    kept = sorted((row for row in rows if "picture" in row), key=lambda row: not row.get("seen", False))[:SHOWN]
    return [
        {"url": _url(folder / row["picture"]), "seen": row.get("seen", False), "label": _label(row)} for row in kept
    ]


def _url(path: Path) -> str:
    with Image.open(path, formats=("PNG",)) as picture:
        picture.thumbnail((WIDEST, WIDEST))
        return data_url(picture)


def _label(row: Mapping[str, Any]) -> str:
    if "image" in row:
        return "/".join(Path(row["image"]).parts[-2:])
    return str(row.get("prompt") or row.get("answer") or "")
