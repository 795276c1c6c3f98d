"""Figures of a run that follow from its own files: counts of images and requests, steps, the verdict's shares."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from erasediff.data.image_lists import FORGET, RETAIN
from erasediff.provenance.json_lines import read_lines
from erasediff.provenance.verdict_evidence import derived_estimates


def run_figures(run: Path) -> dict[str, Any]:
    """All figures of a run, None for those of a file that it lacks. UserError for a file that is damaged."""
    return {
        FORGET: _manifest_figures(run / f"{FORGET}.jsonl"),
        RETAIN: _manifest_figures(run / f"{RETAIN}.jsonl"),
        "metrics": _metrics_figures(run / "metrics.jsonl"),
        "verdict": derived_estimates(run),
    }


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
