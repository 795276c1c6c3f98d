import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from erasediff.cli import options
from erasediff.cli.crash import keep_crash_log_in
from erasediff.cli.output import emit, loading, messages
from erasediff.cli.session import launch_ranks
from erasediff.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from erasediff.workflows.audit import AuditResult


def audit(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="Model to audit: a diffusers folder, a .safetensors file, or the folder of an unlearn run."
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Model that it was made from, the control; by default the run's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for rows, figures and the page.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Image folder or data set, with captions or classes, as unlearn takes it.")
    ] = None,
    forget_class: Annotated[list[str] | None, typer.Option(help="Class that should be forgotten.")] = None,
    forget_phrase: Annotated[
        list[str] | None, typer.Option(help="Words of the captions of images that should be forgotten.")
    ] = None,
    forget_files: Annotated[Path | None, typer.Option(help="List of images that should be forgotten.")] = None,
    forget_data: Annotated[str | None, typer.Option(help="Folder of which all images should be forgotten.")] = None,
    forget_prompts: Annotated[
        str | None, typer.Option(help="Prompts that should be forgotten: 'a;b', or a .txt file.")
    ] = None,
    retain_prompts: Annotated[
        str | None, typer.Option(help="Prompts that should be retained: 'a;b', or a .txt file.")
    ] = None,
    unseen: Annotated[str | None, typer.Option(help="Images that no model was trained on, for membership.")] = None,
    word: Annotated[list[str] | None, typer.Option(help="Word of the concept, to invert and paraphrase.")] = None,
    paraphrases: Annotated[
        str | None, typer.Option(help="Further prompts for what is forgotten: 'a;b', or a .txt file.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="What images show: clip:FOLDER, classifier:FOLDER, onnx:FILE, module:function; by default the base."
        ),
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="Model that never saw the images, for membership.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA over MODEL: what is audited is both together.")] = None,
    saemnesia: Annotated[Path | None, typer.Option(help="Eraser to attach to MODEL.")] = None,
    features: Annotated[
        str | None, typer.Option(metavar="FOLDER|module:function", help="Features that distances are taken in.")
    ] = None,
    batteries: Annotated[str | None, typer.Option(help="Batteries to measure, such as prompts,inversion.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short settings of all batteries.")] = False,
    protocol: Annotated[str | None, typer.Option(help="Published protocol: i2p, uda or ring-a-bell.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Its prompt file, .csv or .txt.")] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Exit with 3 if more of what should be forgotten is seen in any battery."),
    ] = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    device: options.Device = None,
    launch: options.Launch = None,
    processes: options.Processes = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the audit in --out, by the same command.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimated cost; write nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Audit any checkpoint: can what it should have forgotten be brought back, and what was damaged?

    Exit codes: 0 the audit was completed, whatever it found; 2 invalid input, before anything is written; 3 more was
    found than --fail-above allows; 130 stopped by Ctrl-C, to be continued with --resume.
    """
    if fail_above is not None and not 0 <= fail_above <= 1:
        raise UserError(f"--fail-above is a share from 0 to 1, not {fail_above:g}.")
    if out is None and not dry_run:
        raise UserError("There is no folder to write to: give --out.")
    with loading(messages):
        from erasediff.audit.settings import audit_config_class
        from erasediff.workflows import audit as stage
    run = None if model is None else stage.run_folder_settings(model)
    if run is not None and launch is None:
        # However many processes the run took.
        launch, processes = "none", None
    full_config, section = options.configure_with(
        "audit",
        audit_config_class(),
        config or run,
        settings,
        audit__model=model,
        audit__base=base,
        audit__reference=reference,
        audit__judge=judge,
        audit__unseen=unseen,
        audit__words=word,
        audit__paraphrases=options.prompts(paraphrases),
        audit__features=features,
        audit__batteries=None if batteries is None else [name.strip() for name in batteries.split(",")],
        audit__quick=quick or None,
        audit__protocol=protocol,
        audit__protocol_prompts=prompts,
        images__data=data,
        images__forget_classes=forget_class,
        images__forget_phrases=forget_phrase,
        images__forget_files=forget_files,
        images__forget_data=forget_data,
        images__forget_prompts=options.prompts(forget_prompts),
        images__retain_prompts=options.prompts(retain_prompts),
        text_to_image__lora=lora,
        saemnesia__eraser=saemnesia,
        sample__guidance_scale=guidance,
        seed=seed,
        device=device,
        **options.distributed(launch, None, processes, None, None),
    )
    section.chosen()
    if dry_run:
        found = stage.estimate(full_config, section, messages)
        emit({cost.battery: {"passes": cost.passes, "seconds": cost.seconds} for cost in found}, as_json=as_json)
        return
    assert out is not None
    keep_crash_log_in(out)
    if full_config.distributed.launch not in ("none", "ddp"):
        raise UserError("An audit shares its pieces among processes: use --launch ddp.")
    launch_ranks(full_config)
    command = shlex.join(["erasediff", *sys.argv[1:]])
    try:
        result = stage.audit(full_config, section, out, messages, resume=resume, limit=fail_above, command=command)
    except KeyboardInterrupt:
        messages.print(f"Stopped; every finished piece is in {escape(str(out))}.", soft_wrap=True)
        messages.print("Continue with the same command and [bold]--resume[/].")
        raise typer.Exit(128 + signal.SIGINT) from None
    emit(_summary(result), as_json=as_json, shown=_table(result))
    excess = None if fail_above is None else result.exceeds(fail_above)
    if excess is not None:
        raise RunFailedError(excess)


def _summary(result: "AuditResult") -> dict[str, Any]:
    return {"audit": str(result.folder), "batteries": [outcome.to_dict() for outcome in result.outcomes]}


def _table(result: "AuditResult") -> Table:
    from erasediff.audit.battery_outcome import BASE, MODEL
    from erasediff.report.audit_page import shown

    table = Table("Battery", "Figure", "Model", "Base", caption=f"Page: {result.folder / 'audit.html'}")
    for outcome in result.outcomes:
        for number, figure in enumerate(outcome.figures):
            name = "" if number else outcome.name
            table.add_row(name, figure.name, shown(figure, MODEL), shown(figure, BASE))
    return table
