from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erasediff.cli import options
from erasediff.cli.output import loading, messages
from erasediff.cli.session import launch_workers, resolve_run, run_job, signing_key
from erasediff.config.method_index import barrier_names, method_index
from erasediff.config.unlearn_config import or_list

if TYPE_CHECKING:
    from erasediff.training.job import StandaloneJob, TrainingJob
    from erasediff.training.run_dir import RunPlace


def build_job(
    *,
    out: Path | None = None,
    model: Annotated[
        Path | None, typer.Option(help="Model to unlearn from: a diffusers folder, a .safetensors file, or a hub id.")
    ] = None,
    after: Annotated[
        Path | None,
        typer.Option(help="A run to follow: its model is unlearned from, and what it forgot stays forgotten."),
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Classes to forget by number, such as 3 or 3,5.")] = None,
    retain: Annotated[str | None, typer.Option(help="Classes to retain by number; by default all others.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Image folder or data set, with captions or classes; what is not forgotten is retained."),
    ] = None,
    forget_class: Annotated[
        list[str] | None,
        typer.Option(
            help="Forget this class, by name or number (subfolder or column); give it once for each of several."
        ),
    ] = None,
    retain_class: Annotated[
        list[str] | None, typer.Option(help="Without prompts: retain this class; by default all others.")
    ] = None,
    relabel_class: Annotated[
        list[str] | None, typer.Option(help="Without prompts: relabel what is forgotten to this class.")
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
    cache: options.Cache = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{or_list(list(method_index()))}; `erasediff info --methods` describes them."),
    ] = None,
    barrier: Annotated[str | None, typer.Option(help=f"Barrier: {or_list(list(barrier_names()))}.")] = None,
    eta: Annotated[float | None, typer.Option(help="Strength of the barrier (fixed: the multiplier itself).")] = None,
    target: Annotated[str | None, typer.Option(help="Forget target: uniform, gaussian or relabel.")] = None,
    steps: options.Steps = None,
    until: Annotated[
        str | None,
        typer.Option(
            help="steps, or forgotten: go on in rounds of --steps until it is. By default forgotten, without --steps."
        ),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of all rounds at most; four rounds by default.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Minutes after which no further round begins.")] = None,
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
    verdict: bool | None = None,
    judge: list[str] | None = None,
    keep: str | None = None,
    unseen_data: str | None = None,
) -> "tuple[RunPlace | None, TrainingJob | StandaloneJob]":
    """The unlearning run that flags describe, and where it goes: nowhere, if it is to be measured.

    Its annotated parameters are the flags that ``unlearn`` and ``bench`` share.
    """
    flags: dict[str, Any] = dict(
        unlearn__model=model,
        images__after=after,
        unlearn__forget=options.class_numbers(forget),
        unlearn__retain=_retained(retain, retain_class),
        unlearn__relabel_to=relabel_class,
        images__data=data,
        images__forget_classes=forget_class,
        images__forget_phrases=forget_phrase,
        images__forget_files=forget_files,
        images__forget_data=forget_data,
        images__forget_prompts=options.prompts(forget_prompts),
        images__retain_prompts=options.prompts(retain_prompts),
        images__skip_broken=skip_broken or None,
        images__cache=cache,
        text_to_image__anchor_prompts=options.prompts(anchor_prompts),
        text_to_image__train=train,
        text_to_image__lora=lora,
        unlearn__method=method,
        unlearn__barrier=barrier,
        unlearn__eta=eta,
        unlearn__target=target,
        unlearn__steps=steps,
        unlearn__until=until,
        unlearn__max_steps=max_steps,
        unlearn__max_minutes=max_minutes,
        unlearn__batch_size=batch_size,
        unlearn__lr=lr,
        verdict__enabled=verdict,
        verdict__judges=judge,
        verdict__keep=keep,
        verdict__unseen_data=unseen_data,
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


def _retained(numbers: str | None, names: list[str] | None) -> list[int | str] | None:
    """Classes of --retain and --retain-class together; None for neither."""
    if numbers is None and names is None:
        return None
    return [*(options.class_numbers(numbers) or ()), *(names or ())]


def unlearn(
    *,
    out: options.RunOut = None,
    resume: options.Resume = None,
    dry_run: options.DryRun = False,
    verdict: Annotated[
        bool | None,
        typer.Option("--verdict/--no-verdict", help="End the run with a verdict on what it forgot and retained."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge besides the original model, which decides in its place: clip:FOLDER, classifier:FOLDER, "
            "onnx:FILE[:LABELS], nudenet or module:function. May be repeated."
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Name in OUT of a model that did not pass; by default, one that says why.")
    ] = None,
    unseen_data: Annotated[
        str | None,
        typer.Option(help="Images that the model never saw, with whose losses those of --forget-files are compared."),
    ] = None,
    sign: options.Sign = None,
    as_json: options.Json = False,
    **flags: Any,
) -> None:
    """Make a model forget, and save the result in OUT/model as a diffusers folder.

    A class-conditional or unconditional model forgets classes or images; a text-to-image model forgets captioned
    images, or prompts.

    The run ends with a verdict: the model from before judges what the unlearned one draws, and so may others. It is in
    OUT/verdict.json and, with pictures, in OUT/report.html.

    Exit codes: 0 forgotten and retained; 2 invalid input, before the first step; 3 the run failed, without OUT/model:
    the verdict is another one, and the model is called OUT/model-not-forgotten, model-damaged or model-unproven; or
    more than one step in ten was skipped as not finite, or no weight changed.
    """
    key = signing_key(sign)
    flags |= {"verdict": verdict, "judge": judge, "keep": keep, "unseen_data": unseen_data}
    build = partial(build_job, out=out, resume=resume, dry_run=dry_run, **flags)
    run_job(build, "unlearn", as_json=as_json, out=out, key=key)


unlearn.__signature__ = options.signature(unlearn, build_job, first="out")  # type: ignore[attr-defined]
