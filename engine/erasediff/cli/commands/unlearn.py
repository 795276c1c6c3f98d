from pathlib import Path
from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import loading, messages
from erasediff.cli.runs import carry_out, place_and_config


def unlearn(
    out: options.RunOut = None,
    model: Annotated[Path | None, typer.Option(help="The diffusers folder to unlearn from.")] = None,
    forget: Annotated[str | None, typer.Option(help="Classes to forget, such as 3 or 3,5.")] = None,
    retain: Annotated[str | None, typer.Option(help="Classes to retain; by default all others.")] = None,
    method: Annotated[str | None, typer.Option(help="erasediff, finetune or neggrad.")] = None,
    barrier: Annotated[str | None, typer.Option(help="norm, gap, fixed or cosine.")] = None,
    eta: Annotated[float | None, typer.Option(help="The barrier's strength (fixed: the multiplier itself).")] = None,
    target: Annotated[str | None, typer.Option(help="uniform, gaussian or relabel.")] = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Make a model forget classes, and save the result as a diffusers folder in OUT/model."""
    place, full_config = place_and_config(
        out,
        resume,
        config,
        settings,
        dry_run=dry_run,
        unlearn__model=model,
        unlearn__forget=options.class_numbers(forget),
        unlearn__retain=options.class_numbers(retain),
        unlearn__method=method,
        unlearn__barrier=barrier,
        unlearn__eta=eta,
        unlearn__target=target,
        unlearn__steps=steps,
        unlearn__batch_size=batch_size,
        unlearn__lr=lr,
        seed=seed,
        device=device,
    )
    with loading(messages):
        from erasediff.stages.unlearning import unlearning_session
    carry_out(unlearning_session(full_config), place, as_json=as_json)
