from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages
from erasediff.errors import UserError

if TYPE_CHECKING:
    from erasediff.planning import Overview


def plan(
    model: Annotated[
        str,
        typer.Option(help="sd15, sd21, sdxl, flux; a diffusers folder, .safetensors file or hub id; a config.json."),
    ],
    train: Annotated[str, typer.Option(help="As in `unlearn`: full, xattn, ..., re:EXPRESSION or lora.")] = "xattn",
    ranks: Annotated[str, typer.Option(help="Numbers of GPUs, such as 1,8,64.")] = "1,8,64",
    precision: Annotated[
        Literal["float32", "autocast", "bfloat16"],
        typer.Option(help="autocast: bf16 operators on fp32 weights; bfloat16: bf16 weights too."),
    ] = "bfloat16",
    batch_size: Annotated[int, typer.Option(min=1, help="Retained samples per GPU, and as many forgotten ones.")] = 1,
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels of each side; by default the model's.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Run each block twice instead of keeping its insides.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=1, help="With --train lora.")] = 16,
    target: Annotated[
        Literal["uniform", "gaussian", "relabel"], typer.Option(help="relabel adds a frozen teacher.")
    ] = "uniform",
    ema: Annotated[bool, typer.Option("--ema", help="Keep a running average of the weights.")] = False,
    deepspeed_config: Annotated[
        Path | None, typer.Option(help="DeepSpeed JSON whose buffer sizes are planned; by default DeepSpeed's own.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show memory per GPU for each ZeRO stage and offload, and the FLOPs of a step. Reads no weights, needs no GPU."""
    counts = options.whole_numbers(ranks, "Numbers of GPUs")
    if not counts or min(counts) < 1:
        raise UserError(f'Say how many GPUs, such as --ranks 1,8,64; not "{ranks}".')
    with loading(messages):
        from erasediff.planning import overview
        from erasediff.planning.memory import buckets_of
    with messages.status("Counting a step on tensors without memory"):
        planned = overview(
            model,
            train=train,
            lora_rank=lora_rank,
            ranks=counts,
            precision=precision,
            batch_size=batch_size,
            resolution=resolution,
            gradient_checkpointing=gradient_checkpointing,
            relabel=target == "relabel",
            averages=ema,
            buckets=buckets_of(deepspeed_config),
        )
    emit(planned.to_json(), as_json=as_json, shown=None if as_json else Group(_heading(planned), _table(planned)))


def _heading(planned: "Overview") -> Text:
    flops = planned.flops
    teacher = f", of these {flops.teacher / 1e12:.3g} the teacher's" if flops.teacher else ""
    checkpointing = "on" if planned.gradient_checkpointing else "off"
    return Text(
        f"{planned.model} at {planned.resolution} pixels, {planned.precision}, gradient checkpointing {checkpointing}, "
        f"{planned.batch_size} retained + {planned.batch_size} forgotten samples per GPU\n"
        f"{planned.parameters / 1e6:,.1f} M parameters, {planned.parameters_trained / 1e6:,.1f} M trained "
        f"({planned.train})\n"
        f"{flops.total / 1e12:,.4g} TFLOP per step and GPU{teacher}; "
        f"fine-tuning on as many samples: {flops.fine_tuning / 1e12:,.4g}\n"
        f"{planned.traced.activation_bytes / 2**30:,.2f} GiB of activations at most, of one pass\n"
    )


def _table(planned: "Overview") -> Table:
    from erasediff.planning.overview import DEVICE_GB, RESERVE_BYTES, RESERVE_SHARE

    table = Table(box=None, padding=(0, 1, 0, 0), title="Memory per GPU, GiB", title_justify="left")
    table.add_column("GPUs", no_wrap=True)
    table.add_column("", no_wrap=True)
    for column in ("weights", "optimizer", "gradients", "buffers", "peak", "host", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    previous = None
    for row in planned.rows:
        if previous not in (None, row.layout.ranks):
            table.add_row()
        memory = row.memory
        optimizer = memory.masters + memory.moments + memory.averages
        values = (
            memory.weights + memory.teacher,
            optimizer,
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
        f"Fits: the smallest of {', '.join(map(str, DEVICE_GB))} GB, beside {RESERVE_BYTES / 1e9:g} GB for its context "
        f"and {RESERVE_SHARE:.0%} for fragmentation. The peak holds activations too, but is below the sum: gradients "
        "come to be while activations go. Offload: the optimizer, under ZeRO 3 the parameters too."
    )
    table.caption_justify = "left"
    return table
