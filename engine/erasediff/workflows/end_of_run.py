"""End of an unlearning run: the verdict, by the main rank while the others wait."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from erasediff.config import Config
from erasediff.parallel.control_plane import ControlPlane
from erasediff.verdict.outcome import Figure, Verdict
from erasediff.workflows.verdict import examine_run
from erasediff.workflows.verdict_files import REPORT, record
from erasediff.workflows.verdict_outcome import undecided


@dataclass(frozen=True, slots=True)
class EndOfRun:
    """How a run ended, the same on each rank.

    Attributes:
        sentence: The verdict.
        model: Path of the model, which may have another name now.
        report: Path of the report.
        failure: Sentence for a run that is no success; None for one that is.
    """

    sentence: str
    model: str
    report: str
    failure: str | None


def end_run(
    config: Config, run: Path, model: Path, console: Console, *, command: str, eraser: Path | None = None
) -> EndOfRun:
    """Examine the model of a finished run, write the verdict's files, and print the verdict. A collective.

    Args:
        config: Configuration of the run, complete.
        run: Folder of the run.
        model: The unlearned model; with ``eraser``, the one that it is attached to.
        console: Console for progress bars and figures.
        command: Command that repeats the run.
        eraser: A concept eraser that takes the place of an unlearned model.

    Raises:
        UserError: A model or judge cannot be read, or the disk refuses.
    """
    peers = ControlPlane.current()
    ended: EndOfRun | None = None
    with peers.main_process_first():
        if peers.is_main:
            ended = _end(config, run, model, console, command=command, eraser=eraser)
    common: EndOfRun = peers.broadcast_object(ended)
    return common


def _end(config: Config, run: Path, model: Path, console: Console, *, command: str, eraser: Path | None) -> EndOfRun:
    try:
        examination = examine_run(config, run, model, console, eraser=eraser)
    except torch.OutOfMemoryError:
        examination = undecided("concept", "The device has no room for the two models: set sample.batch_size lower.")
    verdict = examination.verdict
    named = record(examination, config, run, model, command, renames=eraser is None)
    for figure in verdict.figures:
        if figure.limit is not None or figure.before is not None:
            console.print(f"  {_line(figure)}", markup=False, highlight=False, soft_wrap=True)
    style = "green" if verdict.passed else "yellow" if "cannot tell" in verdict.sentence else "red"
    console.print(f"Verdict: {verdict.sentence}.", style=style, markup=False, highlight=False, soft_wrap=True)
    return EndOfRun(verdict.sentence, str(named), str(run / REPORT), _failure(verdict, named))


def _failure(verdict: Verdict, model: Path) -> str | None:
    if verdict.passed:
        return None
    return " ".join(
        [f"{verdict.sentence[:1].upper()}{verdict.sentence[1:]}.", *verdict.reasons, f"The model is {model}."]
    )


def _line(figure: Figure) -> str:
    """A figure in one line, such as "recognised: 100.0% -> 0.0% [0.0, 6.0] of 60, at most 10%"."""
    is_share = figure.judge is not None
    value = f"{figure.after.value:.1%}" if is_share else f"{figure.after.value:.3g}"
    before = "" if figure.before is None else f"{figure.before.value:{'.1%' if is_share else '.3g'}} before, "
    low, high = (f"{100 * end:.1f}" if is_share else f"{end:.3g}" for end in (figure.after.low, figure.after.high))
    limit = "" if figure.limit is None else f", {figure.relation} {figure.limit:{'.0%' if is_share else '.3g'}}"
    return (
        f"{figure.title}: {before}{value} [{low}, {high}] of {figure.after.count}{limit} ({figure.judge or 'models'})"
    )
