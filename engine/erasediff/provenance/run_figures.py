"""Figures of a run that follow from its own files: counts of images and requests, steps, the verdict's shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from erasediff.data.image_lists import FORGET, RETAIN
from erasediff.errors import UserError
from erasediff.io.json_file import parse_object, read_object
from erasediff.io.user_file import LARGEST_TEXT, read_bytes
from erasediff.provenance.run_files import VERDICT, VERDICT_LINES
from erasediff.verdict.statistics import mean, share


def run_figures(run: Path) -> dict[str, Any]:
    """All figures of a run, None for those of a file that it lacks. UserError for a file that is damaged."""
    return {
        FORGET: _manifest_figures(run / f"{FORGET}.jsonl"),
        RETAIN: _manifest_figures(run / f"{RETAIN}.jsonl"),
        "metrics": _metrics_figures(run / "metrics.jsonl"),
        "verdict": _verdict_figures(run),
    }


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file. UserError that names the line which is none, or which was cut short."""
    lines = read_bytes(path, LARGEST_TEXT).split(b"\n")
    if lines.pop():
        raise UserError(f"{path} is cut short: its last line, {len(lines) + 1}, does not end.")
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_object(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is no record: {error}.") from None


def _manifest_figures(path: Path) -> dict[str, Any] | None:
    """Number of images of a list, of those that were read, and of those of each request."""
    if not path.is_file():
        return None
    images = read = 0
    requests: Counter[str] = Counter()
    for record in read_lines(path):
        images += 1
        read += record.get("sha256") is not None
        requests.update(map(str, record.get("selected_by", ())))
    return {"images": images, "read": read, "requests": dict(requests)}


def _metrics_figures(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    steps = [record.get("step") for record in read_lines(path)]
    return {"records": len(steps), "last_step": steps[-1] if steps else None}


def _verdict_figures(run: Path) -> dict[str, Any] | None:
    """Estimates of the verdict, from its own lines.

    A line of ``verdict.jsonl`` is a sample: ``figure`` names the figure of ``verdict.json`` that it counts in, and it
    has a ``hit``, of a share with Wilson's interval, or a ``value``, of a mean with Student's.
    """
    if not (run / VERDICT).is_file() or not (run / VERDICT_LINES).is_file():
        return None
    hits: defaultdict[str, list[bool]] = defaultdict(list)
    values: defaultdict[str, list[float]] = defaultdict(list)
    for line in read_lines(run / VERDICT_LINES):
        if isinstance(line.get("hit"), bool):
            hits[str(line.get("figure"))].append(line["hit"])
        elif isinstance(line.get("value"), int | float):
            values[str(line.get("figure"))].append(float(line["value"]))
    estimates = {name: share(sum(found), len(found)) for name, found in hits.items()}
    estimates |= {name: mean(found) for name, found in values.items()}
    return {name: estimate.to_dict() for name, estimate in sorted(estimates.items())}


def verdict_statements(run: Path) -> dict[str, Any]:
    """What ``verdict.json`` says of each figure that its lines have: value, ends of the interval, count.

    UserError for a file that is damaged.
    """
    figures = read_object(run / VERDICT).get("figures")
    figures = figures if isinstance(figures, dict) else {}
    keys = ("value", "low", "high", "count")
    return {
        name: {key: stated.get(key) for key in keys}
        for name, stated in sorted(figures.items())
        if isinstance(stated, dict)
    }
