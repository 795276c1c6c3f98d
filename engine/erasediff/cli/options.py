"""Flags that commands share, and the configuration made of them."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from erasediff.cli.output import loading, messages
from erasediff.config import Config, load_config, load_config_and_section, parse_assignments
from erasediff.config.schema import SectionT
from erasediff.errors import UserError

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags override it.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, as in --set train.ema_decay=0.99.")
]
Seed = Annotated[int | None, typer.Option(help="Random seed.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print time and memory, measured on trial steps; write nothing.")
]
Resume = Annotated[
    str | None, typer.Option(metavar="latest|PATH", help="Continue the run at --out, or the run or checkpoint at PATH.")
]
Cache = Annotated[
    str | None,
    typer.Option(metavar="needed|all", help="Images to read and encode: those that the steps will see, or all."),
]
Sign = Annotated[
    str | None, typer.Option(metavar="ssh:KEYFILE", help="Sign the run's receipt with an SSH key, by ssh-keygen.")
]
RunOut = Annotated[Path | None, typer.Option("--out", help="Folder for the run.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples per step.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
Lora = Annotated[Path | None, typer.Option(help="A LoRA to merge into the model first.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Classifier-free guidance scale.")]

Launch = Annotated[str | None, typer.Option(help="Parallelism: none, ddp, fsdp (FSDP2) or zero (DeepSpeed).")]
Stage = Annotated[int | None, typer.Option(min=0, max=3, help="ZeRO stage (with --launch zero).")]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes on this machine; by default one per GPU, or 1 on a CPU."),
]
Offload = Annotated[
    str | None, typer.Option(metavar="optimizer|params", help="Offload optimizer state to the CPU, or parameters too.")
]
DeepSpeedConfig = Annotated[Path | None, typer.Option("--deepspeed-config", help="DeepSpeed configuration (JSON).")]


def distributed(
    launch: str | None, stage: int | None, processes: int | None, offload: str | None, deepspeed_config: Path | None
) -> dict[str, Any]:
    """The flags of running in several processes, as settings for ``configure``. UserError for an unknown offload."""
    if offload not in (None, "none", "optimizer", "params"):
        raise UserError(f'There is no offloading of "{offload}"; use --offload optimizer or params.')
    return {
        "distributed__launch": launch,
        "distributed__stage": stage,
        "distributed__processes": processes,
        "distributed__offload_optimizer": None if offload is None else offload != "none",
        "distributed__offload_params": None if offload is None else offload == "params",
        "distributed__deepspeed_config": deepspeed_config,
    }


def configure(file: Path | None, settings: list[str] | None, **flags: Any) -> Config:
    """The configuration in ``file``, under ``--set``, under the flags that were given.

    A flag's name is the setting's with ``__`` for the dot, as in ``train__lr``. UserError for one that says nothing of
    how the run is launched.
    """
    overrides = parse_assignments(settings or []) | _dotted(flags)
    with loading(messages):
        config = load_config(file, overrides)
    _check_launch_flags(config, _dotted(flags))
    return config


def configure_with(
    name: str, kind: type[SectionT], file: Path | None, settings: list[str] | None, **flags: Any
) -> tuple[Config, SectionT]:
    """``configure`` of a command with a section ``name`` of its own, and that section."""
    overrides = parse_assignments(settings or []) | _dotted(flags)
    with loading(messages):
        config, section = load_config_and_section(name, kind, file, overrides)
    _check_launch_flags(config, _dotted(flags))
    return config, section


def _dotted(flags: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in flags.items() if value is not None}


def _check_launch_flags(config: Config, given: dict[str, Any]) -> None:
    launch = config.distributed.launch
    for name, flag, wanted, is_idle in (
        ("distributed.processes", "--processes", "ddp, fsdp or zero", launch == "none"),
        ("distributed.stage", "--stage", "zero", launch != "zero"),
        ("distributed.deepspeed_config", "--deepspeed-config", "zero", launch != "zero"),
    ):
        if is_idle and name in given:
            raise UserError(f"{flag} is for --launch {wanted}, but this run has --launch {launch}.")


def given(settings: list[str] | None, **flags: Any) -> list[str]:
    """Dotted names of the settings that ``--set`` and flags give, the latter as in ``configure``."""
    named = [name.replace("__", ".") for name, value in flags.items() if value is not None]
    return [*parse_assignments(settings or []), *named]


def signature(command: Callable[..., Any], shared: Callable[..., Any], first: str | None = None) -> inspect.Signature:
    """The signature that typer reads: the flags of ``shared``, and around them those of ``command`` itself.

    Args:
        command: has keyword parameters of its own, and ``**flags`` for the others.
        shared: has the other parameters; those without an annotation of typer's are left out.
        first: the parameter of ``command`` that comes first; all others come last.
    """
    parameters = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    others = [
        parameter
        for parameter in inspect.signature(shared).parameters.values()
        if hasattr(parameter.annotation, "__metadata__")
    ]
    ordered = [
        *(parameter for parameter in parameters if parameter.name == first),
        *others,
        *(parameter for parameter in parameters if parameter.name != first),
    ]
    return inspect.Signature(ordered, return_annotation=None)


def prompts(text: str | None) -> list[str] | None:
    """``"a cat;a dog"``, or a ``.txt`` file of a prompt a line, as ``["a cat", "a dog"]``. UserError for neither."""
    if text is None:
        return None
    if text.endswith(".txt"):
        from erasediff.data import read_prompts

        return read_prompts(Path(text))
    listed = [part.strip() for part in text.split(";") if part.strip()]
    if not listed:
        raise UserError("There is no prompt: give some with semicolons between them, such as 'a cat;a dog'.")
    return listed


def class_numbers(text: str | None) -> list[int] | None:
    """``"3,5"`` as ``[3, 5]``. UserError for anything but whole numbers."""
    return None if text is None else whole_numbers(text, "Classes")


def class_references(text: str | None) -> list[int | str] | None:
    """``"3,airplane"`` as ``[3, "airplane"]``: numbers and names of classes."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) if part.isascii() and part.isdecimal() else part for part in parts]


def whole_numbers(text: str, of: str) -> list[int]:
    """``"3,5"`` as ``[3, 5]``. UserError, which calls them ``of``, for anything but whole numbers."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f'{of} are whole numbers with commas between them, such as 3,5; not "{text}".') from None
