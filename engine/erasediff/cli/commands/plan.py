from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages
from erasediff.errors import UserError

if TYPE_CHECKING:
    from erasediff.planning import Overview

EMA_DECAY = 0.999


def plan(
    model: Annotated[
        str,
        typer.Option(help="sd15, sd21, sdxl, flux; a diffusers folder, .safetensors file or hub id; a config.json."),
    ],
    train: Annotated[str | None, typer.Option(help="As in `unlearn`: full, xattn, ..., re:EXPRESSION or lora.")] = None,
    method: Annotated[str | None, typer.Option(help="As in `unlearn`, erasediff by default.")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of GPUs, such as 1,8,64.")] = "1,8,64",
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32; bf16-mixed: bf16 operators on fp32 weights; bf16-true: bf16 weights too; else as in `unlearn`."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Retained samples per GPU, and as many forgotten ones. Default: as in `unlearn`."),
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels of each side; by default the model's.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="With --train lora.")] = None,
    barrier: Annotated[str | None, typer.Option(help="As in `unlearn`; gap adds an inner solve.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="uniform, gaussian or relabel, which adds a forward pass. Default: as in `unlearn`."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Keep a running average of the weights.")] = False,
    deepspeed_config: Annotated[
        Path | None, typer.Option(help="DeepSpeed JSON whose buffer sizes are planned; by default DeepSpeed's own.")
    ] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Estimate memory per GPU for each ZeRO stage and offload, and FLOPs per step. Reads no weights, needs no GPU.

    The step is the one that `erasediff unlearn` takes with the same settings; `unlearn --dry-run` measures it.
    """
    counts = options.whole_numbers(ranks, "Numbers of GPUs")
    if not counts or min(counts) < 1:
        raise UserError(f'There is no number of GPUs in "{ranks}"; give some, such as --ranks 1,8,64.')
    full_config = options.configure(
        config,
        settings,
        unlearn__method=method,
        unlearn__barrier=barrier,
        unlearn__target=target,
        unlearn__ema_decay=EMA_DECAY if ema else None,
        images__height=resolution,
        images__width=resolution,
        text_to_image__train=train,
        text_to_image__lora_rank=lora_rank,
        text_to_image__gradient_checkpointing=gradient_checkpointing or None,
        **({} if precision is None else _precision(precision)),
    )
    changes: dict[str, Any] = {}
    if batch_size is not None:
        # Per GPU, while unlearn.batch_size is that of all.
        launch = full_config.distributed
        processes = 1 if launch.launch == "none" else launch.processes
        changes["unlearn"] = full_config.unlearn.model_copy(update={"batch_size": batch_size * processes})
    if deepspeed_config is not None:
        changes["distributed"] = full_config.distributed.model_copy(update={"deepspeed_config": deepspeed_config})
    with loading(messages):
        from erasediff.workflows.plan import plan as planned_run
    with messages.status("Counting a step on tensors without memory"):
        planned = planned_run(full_config.model_copy(update=changes), model, ranks=counts)
    emit(planned.to_json(), as_json=as_json, shown=None if as_json else Group(_heading(planned), _table(planned)))


def _precision(text: str) -> dict[str, Any]:
    """The settings that ``text`` stands for. UserError for an unknown precision."""
    from erasediff.planning.step_plan import parse_precision

    precision = parse_precision(text)
    return {
        "precision": "bfloat16" if precision == "bf16-mixed" else "float32",
        "text_to_image__weights": "bfloat16" if precision == "bf16-true" else "float32",
    }


def _heading(planned: "Overview") -> Text:
    step, flops = planned.step, planned.flops
    checkpointing = ", gradient checkpointing" if step.gradient_checkpointing else ""
    accumulation = f" in {step.accumulation_steps} micro-batches" if step.accumulation_steps > 1 else ""
    return Text(
        f"{planned.model} at {planned.resolution} pixels, {step.method}, {step.precision}{checkpointing}, "
        f"{step.batch_size} retained + {step.batch_size} forgotten samples per GPU{accumulation}\n"
        f"{planned.parameters / 1e6:,.1f} M parameters, {planned.parameters_trained / 1e6:,.1f} M trained "
        f"({step.train})\n"
        f"Per step and GPU: {step.describe()}\n"
        f"{flops.total / 1e12:,.4g} TFLOP per step and GPU; "
        f"fine-tuning on as many samples: {flops.fine_tuning / 1e12:,.4g}\n"
        f"{planned.rows[0].memory.activations / 2**30:,.2f} GiB of activations at the peak\n"
    )


def _table(planned: "Overview") -> Table:
    from erasediff.planning.overview import DEVICE_GB, RESERVE_BYTES, RESERVE_SHARE

    table = Table(box=None, padding=(0, 1, 0, 0), title="Memory per GPU, GiB", title_justify="left")
    table.add_column("GPUs", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("weights", "teacher", "optimizer", "grads", "buffers", "peak", "host", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for row in planned.rows:
        if previous not in (None, row.layout.ranks):
            table.add_row()
        memory = row.memory
        values = (
            memory.weights,
            memory.teacher,
            memory.masters + memory.moments + memory.averages + memory.method,
            memory.gradients,
            memory.buffers,
            memory.peak,
            memory.host,
        )
        fits = f"[green]{row.device_gb} GB[/]" if row.device_gb else "[red]none[/]"
        count = str(row.layout.ranks) if previous != row.layout.ranks else ""
        table.add_row(count, row.layout.label, *(f"{value / 2**30:,.2f}" for value in values), fits)
        previous = row.layout.ranks
    table.caption = (
        f"Fits: the smallest of {', '.join(map(str, DEVICE_GB))} GB, after {RESERVE_BYTES / 1e9:g} GB for the CUDA "
        f"context and {RESERVE_SHARE:.0%} for fragmentation. Peak: less than the sum, since activations are freed "
        "while gradients are made. Optimizer: moments, masters, averages, and what the method keeps per weight. "
        "Offload: the optimizer, under ZeRO 3 the parameters too."
    )
    table.caption_justify = "left"
    return table
