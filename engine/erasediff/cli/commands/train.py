from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import loading, messages
from erasediff.cli.session import launch_workers, resolve_run, run_job, signing_key


def train(
    out: options.RunOut = None,
    data: Annotated[
        str | None,
        typer.Option(help="Image folder with a folder per class, or any other data set; by default the digits."),
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Classes to leave out by number or name, such as 3,5.")] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="A model without class labels.")] = False,
    cache: options.Cache = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    device: options.Device = None,
    launch: options.Launch = None,
    stage: options.Stage = None,
    processes: options.Processes = None,
    offload: options.Offload = None,
    deepspeed_config: options.DeepSpeedConfig = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    sign: options.Sign = None,
    as_json: options.Json = False,
) -> None:
    """Train a small diffusion model in pixels from scratch, and save it as a diffusers folder in OUT/model.

    Size, channels and classes are those of the data; the architecture is in the section model of the configuration.

    Exit codes: 0 done; 2 invalid input, before the first step; 3 the run failed, without OUT/model: more than one step
    in ten was skipped as not finite, or no weight changed.
    """
    key = signing_key(sign)
    place, full_config = resolve_run(
        out,
        resume,
        config,
        settings,
        dry_run=dry_run,
        images__data=data,
        images__cache=cache,
        data__exclude=options.class_references(exclude),
        model__conditional=False if unconditional else None,
        train__steps=steps,
        train__batch_size=batch_size,
        train__lr=lr,
        seed=seed,
        device=device,
        **options.distributed(launch, stage, processes, offload, deepspeed_config),
    )
    launch_workers(full_config, "train")
    with loading(messages):
        from erasediff.workflows.train_pixel import training_job
    run_job(
        lambda: (place, training_job(full_config, console=messages, rehearse=place is None)),
        "train",
        as_json=as_json,
        out=out,
        key=key,
    )
