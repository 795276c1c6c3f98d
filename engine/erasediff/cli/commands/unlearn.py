from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erasediff.cli import options
from erasediff.cli.output import loading, messages
from erasediff.cli.session import launch_workers, resolve_run, run_job
from erasediff.config.method_index import barrier_names, method_index
from erasediff.config.schema import or_list

if TYPE_CHECKING:
    from erasediff.training.job import StandaloneJob, TrainingJob
    from erasediff.training.run_dir import RunPlace


def build_job(
    *,
    out: Path | None = None,
    model: Annotated[
        Path | None, typer.Option(help="Model to unlearn from: a diffusers folder, a .safetensors file, or a hub id.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Digits: classes to forget, such as 3 or 3,5.")] = None,
    retain: Annotated[str | None, typer.Option(help="Digits: classes to retain; by default all others.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Image folder or data set with captions; what is not forgotten is retained.")
    ] = None,
    forget_class: Annotated[
        list[str] | None, typer.Option(help="Forget the images of --data of this class (subfolder or column).")
    ] = None,
    forget_phrase: Annotated[
        list[str] | None, typer.Option(help="Forget the images of --data whose captions have these whole words.")
    ] = None,
    forget_files: Annotated[
        Path | None, typer.Option(help="Forget the images of --data in this list of paths, one per line.")
    ] = None,
    forget_data: Annotated[str | None, typer.Option(help="Forget all images of another folder or data set.")] = None,
    forget_prompts: Annotated[
        str | None, typer.Option(help="Forget the images that the model generates for prompts: 'a;b', or a .txt file.")
    ] = None,
    retain_prompts: Annotated[
        str | None, typer.Option(help="Retain the images that the model generates for prompts: 'a;b', or a .txt file.")
    ] = None,
    anchor_prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts to relabel the forgotten concept to; by default chosen among the retained captions."
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Weights to train: full, xattn, xattn-kv, noxattn, selfattn, notime, re:EXPRESSION or lora."),
    ] = None,
    lora: options.Lora = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Report broken images and skip them.")] = False,
    method: Annotated[
        str | None,
        typer.Option(help=f"{or_list(list(method_index()))}; `erasediff info --methods` describes them."),
    ] = None,
    barrier: Annotated[str | None, typer.Option(help=f"Barrier: {or_list(list(barrier_names()))}.")] = None,
    eta: Annotated[float | None, typer.Option(help="Strength of the barrier (fixed: the multiplier itself).")] = None,
    target: Annotated[str | None, typer.Option(help="Forget target: uniform, gaussian or relabel.")] = None,
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
    resume: str | None = None,
    dry_run: bool = False,
) -> "tuple[RunPlace | None, TrainingJob | StandaloneJob]":
    """The unlearning run that flags describe, and where it goes: nowhere, if it is to be measured.

    Its parameters are the flags that ``unlearn`` and ``bench`` share, besides ``out``, ``resume`` and ``dry_run``.
    """
    flags: dict[str, Any] = dict(
        unlearn__model=model,
        unlearn__forget=options.class_numbers(forget),
        unlearn__retain=options.class_numbers(retain),
        images__data=data,
        images__forget_classes=forget_class,
        images__forget_phrases=forget_phrase,
        images__forget_files=forget_files,
        images__forget_data=forget_data,
        images__forget_prompts=options.prompts(forget_prompts),
        images__retain_prompts=options.prompts(retain_prompts),
        images__skip_broken=skip_broken or None,
        text_to_image__anchor_prompts=options.prompts(anchor_prompts),
        text_to_image__train=train,
        text_to_image__lora=lora,
        unlearn__method=method,
        unlearn__barrier=barrier,
        unlearn__eta=eta,
        unlearn__target=target,
        unlearn__steps=steps,
        unlearn__batch_size=batch_size,
        unlearn__lr=lr,
        seed=seed,
        device=device,
        **options.distributed(launch, stage, processes, offload, deepspeed_config),
    )
    place, full_config = resolve_run(out, resume, config, settings, dry_run=dry_run, **flags)
    launch_workers(full_config, "unlearn")
    with loading(messages):
        from erasediff.workflows.unlearn import unlearning_job
    given = options.given(settings, **flags)
    return place, unlearning_job(full_config, messages, place, given)


def unlearn(
    *,
    out: options.RunOut = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    **flags: Any,
) -> None:
    """Make a model forget, and save the result in OUT/model as a diffusers folder.

    A model of the digits forgets classes by number; a text-to-image model forgets captioned images, or prompts.
    """
    place, job = build_job(out=out, resume=resume, dry_run=dry_run, **flags)
    run_job(job, place, as_json=as_json)


unlearn.__signature__ = options.signature(unlearn, build_job, first="out")  # type: ignore[attr-defined]
