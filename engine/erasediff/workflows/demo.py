"""End-to-end demo on the digits: base model, unlearning, controls, retrained model, evaluation and report."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from erasediff.config import Config
from erasediff.data import ClassDataset, class_numbers, forget_retain_split, load_digits
from erasediff.errors import UserError
from erasediff.evaluation import Judge
from erasediff.io import jsonl
from erasediff.io.atomic import atomic_write
from erasediff.report import Column, Contents, render
from erasediff.training.job import set_up_device, thread_scope
from erasediff.training.run_dir import RunFolder, RunPlace
from erasediff.utils.versions import library_versions
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.dry_run import DryRun, dry_run
from erasediff.workflows.evaluate import EvaluatedModel, Evaluation, judge_model
from erasediff.workflows.labelled_run import resolved
from erasediff.workflows.load_model import load_model
from erasediff.workflows.train_pixel import CachedTraining, training_job, untrained_model

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
        for name, judged in evaluation.models.items()
    ]
    contents = Contents(
        columns=columns,
        class_names=dataset.class_names,
        judge_accuracy=evaluation.judge.accuracy,
        command=command,
        settings=config.to_yaml(),
        versions={"python": platform.python_version()} | library_versions("scikit-learn"),
    )
    atomic_write(path, render(contents))


def _rows(evaluation: Evaluation, judged: EvaluatedModel) -> Tensor:
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


DEFAULT_FORGET = (3,)
CONTROLS = ("finetune", "neggrad")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of a demo; ``evaluation`` has the columns base, erasediff, finetune, neggrad and retrained."""

    run: Path
    report: Path
    evaluation: Evaluation


@thread_scope()
def demo(config: Config, place: RunPlace, console: Console, command: str) -> DemoResult:
    """Unlearn ``config.unlearn.forget`` (by default, 3) from a base model, beside three controls, and report on all.

    The base and the model retrained without the classes come from the cache, and are trained where it lacks them. The
    controls take the same number of steps as EraseDiff and live beside it in ``controls/``. A demo that was cut short
    goes on where it stopped. ``command`` is what the report says to repeat.
    """
    config = _complete(config)
    forget = config.unlearn.forget
    base, retrained = CachedTraining(config), CachedTraining(config, exclude=forget)
    config = _with_unlearn(config, model=base.run.model)
    run = place.open(config)

    runs = {"base": base.obtain(console, "Training the base")}
    runs["erasediff"] = _unlearned(config, run.path, console)
    for method in CONTROLS:
        runs[method] = _unlearned(_with_unlearn(config, method=method), run.path / "controls" / method, console)
    runs["retrained"] = retrained.obtain(console, f"Training without {', '.join(map(str, forget))}")

    dataset, device = load_digits(), set_up_device(config)
    judge = Judge.fit(dataset)
    models = {}
    for name, finished in runs.items():
        model = load_model(finished.model, dataset, device)
        models[name] = judge_model(config, model, judge, dataset, forget, console, f"Sampling: {name}")
    evaluation = Evaluation(judge=judge, models=models)

    report = run.path / "report.html"
    records = {name: list(runs[name].metrics.read()) for name in ("erasediff", *CONTROLS)}
    atomic_write(run.path / "evaluation.json", jsonl.dumps(evaluation.to_dict(), indent=2) + "\n")
    with console.status("Writing the report"):
        write_report(report, config, dataset, evaluation, records, command)
    return DemoResult(run=run.path, report=report, evaluation=evaluation)


@thread_scope()
def plan_demo(config: Config) -> dict[str, DryRun]:
    """Estimate the cost of each part of ``demo`` that is not in the cache, by column. Writes nothing."""
    config = _complete(config)
    trainings = {
        "base": CachedTraining(config),
        "retrained": CachedTraining(config, exclude=config.unlearn.forget),
    }
    plans = {
        name: dry_run(training_job(training.config))
        for name, training in trainings.items()
        if not training.run.finished
    }
    for method in ("erasediff", *CONTROLS):
        base = untrained_model(config, set_up_device(config))
        plans[method] = dry_run(build_unlearning_job(_with_unlearn(config, method=method), base))
    return plans


def _complete(config: Config) -> Config:
    """Fill in all open settings of ``config``. UserError for classes that do not exist."""
    if config.images.data is not None:
        raise UserError("The demo is one of the digits: for other data, use train, unlearn and evaluate with --data.")
    dataset = load_digits()
    forget, kept = config.unlearn.forget or DEFAULT_FORGET, config.unlearn.retain
    config = _with_unlearn(
        config,
        forget=class_numbers(forget, dataset.class_names),
        retain=None if kept is None else class_numbers(kept, dataset.class_names),
        method="erasediff",
        # Methods are compared at equal steps.
        until="steps",
    )
    _, retain = forget_retain_split(dataset.train, config.unlearn.forget, config.unlearn.retain)
    return resolved(config, conditional=config.model.conditional, retain=retain)


def _unlearned(config: Config, folder: Path, console: Console) -> RunFolder:
    """Unlearning run at ``folder``, started, resumed, or read if it is finished."""
    run = RunFolder(folder)
    if not run.finished:
        build_unlearning_job(config, console=console).run(RunPlace(folder, resuming=run.begun), console)
    return run


def _with_unlearn(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"unlearn": config.unlearn.model_copy(update=changes)})
