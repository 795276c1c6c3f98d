"""Files of a verdict in a run's folder: verdict.json, verdict.jsonl, report.html, and the name of the model."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from erasediff.config import Config
from erasediff.io import jsonl
from erasediff.io.atomic import atomic_write, remove_directory, storage_errors
from erasediff.io.jsonl import MetricsFile
from erasediff.report import FigureRow, JudgeRow, PictureGroup, PictureRow, VerdictContents, render_verdict
from erasediff.training.run_dir import SINGLE_FILE, VERDICT
from erasediff.utils.versions import library_versions
from erasediff.verdict.outcome import Figure, Verdict
from erasediff.workflows.verdict_outcome import Examination

ROWS, REPORT = "verdict.jsonl", "report.html"
SHOWN = 8
"""Concepts of each group of pictures."""


def record(
    examination: Examination, config: Config, run: Path, model: Path, command: str, *, renames: bool = True
) -> Path:
    """Write the verdict's files to a run's folder, and give a model that did not pass another name.

    Args:
        examination: What was found.
        config: Configuration of the run.
        run: Folder of the run.
        model: The model in it.
        command: Command that repeats the run.
        renames: ``model`` is the run's own.

    Returns:
        Path of the model now.

    Raises:
        UserError: The disk refuses.
    """
    verdict = examination.verdict
    named = model if verdict.passed or not renames else _failed_path(config, verdict, model)
    if named != model:
        with storage_errors(named):
            if named.is_dir():
                remove_directory(named)
            model.replace(named)
    atomic_write(run / ROWS, "".join(jsonl.dumps(row) + "\n" for row in examination.rows))
    atomic_write(run / REPORT, render_verdict(_contents(examination, config, run, command)))
    facts = {**verdict.to_dict(), "model": named.name, "rows": ROWS if examination.rows else None}
    atomic_write(run / VERDICT, jsonl.dumps(facts, indent=2) + "\n")
    return named


def _failed_path(config: Config, verdict: Verdict, model: Path) -> Path:
    """A folder or file of the name that was asked for, or of one that says why."""
    name = config.verdict.keep or verdict.failed_name
    return model.with_name(name + (model.suffix if model.name == SINGLE_FILE else ""))


def _contents(examination: Examination, config: Config, run: Path, command: str) -> VerdictContents:
    verdict, metrics = examination.verdict, MetricsFile(run / "metrics.jsonl")
    undecided = "cannot tell" in (verdict.forgotten, verdict.retained)
    failed = verdict.forgotten == "not forgotten" or verdict.retained == "damaged"
    return VerdictContents(
        title=", ".join(verdict.sought) or "what was asked for",
        verdict=verdict.sentence,
        outcome="failed" if failed else "undecided" if undecided else "passed",
        figures=[_row(figure, several=len(verdict.judges) > 1) for figure in verdict.figures],
        pictures=[
            _group("Forgotten", examination.images, examination.sought),
            _group("Retained", examination.images, examination.retained),
        ],
        judges=[
            JudgeRow(
                str(judge["name"]),
                {name: value for name, value in judge.items() if name != "name"},
                next(
                    (f.before for f in verdict.figures if f.judge == judge["name"] and f.before is not None),
                    None,
                ),
            )
            for judge in verdict.judges
        ],
        records=list(metrics.read()),
        command=command,
        settings=config.to_yaml(),
        versions={"python": platform.python_version()} | library_versions(),
        notes=list(verdict.reasons),
    )


def _row(figure: Figure, *, several: bool) -> FigureRow:
    return FigureRow(
        title=figure.title,
        note=f"by the judge {figure.judge}" if several and figure.judge else "",
        kind="number" if figure.judge is None else "share",
        before=figure.before,
        after=figure.after,
        relation=figure.relation or "at most",
        limit=figure.limit,
        is_met=figure.is_met,
    )


def _group(title: str, images: Mapping[str, Mapping[str, Tensor]], labels: Sequence[str]) -> PictureGroup:
    rows = [
        PictureRow(label, *(images[model][label].expand(-1, 3, -1, -1) for model in ("before", "after")))
        for label in labels[:SHOWN]
    ]
    return PictureGroup(title, rows)
