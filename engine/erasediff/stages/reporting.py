"""From an evaluation of several models to ``report.html``."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from erasediff.config import Config
from erasediff.data import ClassDataset
from erasediff.report import Column, Contents, render
from erasediff.runs.atomic import atomic_write
from erasediff.stages.evaluation import Evaluation, Judged

LIBRARIES = ("erasediff", "torch", "diffusers", "scikit-learn")
Records = Sequence[Mapping[str, Any]]


def write_report(
    path: Path,
    config: Config,
    dataset: ClassDataset,
    evaluation: Evaluation,
    records: Mapping[str, Records],
    command: str,
) -> None:
    """Write one self-contained HTML file; ``records`` are the metrics of each column's run, ``command`` repeats it."""
    summaries = _summaries(config)
    columns = [
        Column(
            title=summaries[name][0],
            summary=summaries[name][1],
            metrics=judged.metrics,
            images=judged.images,
            rows=_rows(evaluation, judged),
            records=records.get(name, ()),
        )
        for name, judged in evaluation.judged.items()
    ]
    contents = Contents(
        columns=columns,
        class_names=dataset.class_names,
        judge_accuracy=evaluation.judge.accuracy,
        command=command,
        settings=config.to_yaml(),
        versions={"python": platform.python_version()} | {library: version(library) for library in LIBRARIES},
    )
    atomic_write(path, render(contents))


def _rows(evaluation: Evaluation, judged: Judged) -> Tensor:
    return judged.labels if judged.labels is not None else evaluation.judge.classify(judged.images)


def _summaries(config: Config) -> dict[str, tuple[str, str]]:
    """Title and summary of each column of a demo."""
    unlearn, trained = config.unlearn, f"{config.train.steps} steps"
    target = (
        f"relabel to {', '.join(map(str, unlearn.relabel_to))}" if unlearn.relabel_to else f"{unlearn.target} target"
    )
    forgotten = ", ".join(map(str, unlearn.forget))
    return {
        "base": ("Base", f"trained on all classes, {trained}"),
        "erasediff": ("EraseDiff", f"{unlearn.steps} steps, {unlearn.barrier} barrier, {target}"),
        "finetune": ("Fine-tuning", f"{unlearn.steps} steps on the other classes"),
        "neggrad": ("Negative gradient", f"{unlearn.steps} steps of ascent on {forgotten}"),
        "retrained": ("Retrained", f"trained without {forgotten}, {trained}"),
    }
