import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages, metrics_table, plans_table
from erasediff.cli.session import resolve_run


def demo(
    forget: Annotated[str | None, typer.Option(help="The digits to forget, such as 3 or 3,5.")] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="A model without class labels.")] = False,
    out: options.RunOut = None,
    steps: options.Steps = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Unlearn a digit (3 by default), beside three controls, and write a report with pictures and numbers.

    The base model is trained once and kept in ~/.cache/erasediff, or in the folder that ERASEDIFF_CACHE names.
    """
    if out is None and resume in (None, "latest"):
        out = numbered_folder(again=resume is not None)
    place, full_config = resolve_run(
        out,
        resume,
        config,
        settings,
        dry_run=dry_run,
        unlearn__forget=options.class_numbers(forget),
        unlearn__steps=steps,
        model__conditional=False if unconditional else None,
        seed=seed,
        device=device,
    )
    with loading(messages):
        from erasediff.workflows import demo as stage
    if place is None:
        with messages.status("Measuring trial steps"):
            plans = {name: asdict(plan) for name, plan in stage.plan_demo(full_config).items()}
        emit(plans, as_json=as_json, shown=plans_table(plans))
        return
    shown = stage.demo(full_config, place, messages, shlex.join(["erasediff", *sys.argv[1:]]))
    columns = {name: model.metrics for name, model in shown.evaluation.models.items()}
    emit(
        {"run": str(shown.run), "report": str(shown.report), **shown.evaluation.to_dict()},
        as_json=as_json,
        shown=Group(metrics_table(columns), f"Report: {shown.report}"),
    )


def numbered_folder(*, again: bool) -> Path:
    """``runs/demo-N`` with the first N after all that are taken, or with the last one that is."""
    taken = [path.name.removeprefix("demo-") for path in Path("runs").glob("demo-*")]
    last = max((int(number) for number in taken if number.isdecimal()), default=0)
    return Path("runs", f"demo-{last if again else last + 1}")
