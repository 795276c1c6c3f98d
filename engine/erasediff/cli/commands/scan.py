from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages
from erasediff.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group

    from erasediff.workflows.scan import Scan

SHOWN = 20


def scan(
    model: Annotated[
        Path, typer.Argument(help="A text-to-image model: a diffusers folder, a .safetensors file, or a hub id.")
    ],
    prompts: Annotated[str, typer.Option(help="Captions to ask about: 'a;b', or a .txt file with one on each line.")],
    control: Annotated[
        str | None,
        typer.Option(help="Captions taken for not memorised, by default 50 plain ones; best are unseen ones alike."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores.jsonl and memorised.txt (runs/scan), or a .txt file.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1024, help="Draws of the initial noise per caption.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps to average, of 50: 1, 10 or 50 are published.")] = 1,
    lora: options.Lora = None,
    saemnesia: Annotated[Path | None, typer.Option(help="The eraser OUT/saemnesia to attach.")] = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Find captions that reproduce training images, without the training images.

    They are found by the magnitude of the text-conditional prediction (Wen et al., ICLR 2024). Those above 99% of the
    control captions are written to a list that `unlearn --forget-prompts` takes. An interrupted scan goes on with the
    same command.
    """
    full_config = options.configure(
        config,
        settings,
        sample__guidance_scale=guidance,
        text_to_image__lora=lora,
        saemnesia__eraser=saemnesia,
        seed=seed,
        device=device,
    )
    asked, plain = options.prompts(prompts), options.prompts(control)
    if not asked:
        raise UserError("There is no caption to ask about: give --prompts some.")
    with loading(messages):
        from erasediff.workflows.scan import scan as scanned
    found = scanned(
        full_config,
        model,
        out or Path("runs", "scan"),
        messages,
        prompts=asked,
        control=plain,
        draws=count,
        steps=steps,
    )
    emit(found.to_dict(), as_json=as_json, shown=_shown(found))


def _shown(found: "Scan") -> "Group":
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "caption", "score", "z")
    for row in found.ranked[:SHOWN]:
        table.add_row("!" if row.flagged else "", escape(row.prompt), f"{row.score:.3f}", f"{row.z:+.1f}")
    total, plain, chance = len(found.ranked), found.control.count, found.to_dict()["expected_by_chance"]
    return Group(
        table,
        *([f"… and {total - SHOWN:,} below"] if total > SHOWN else []),
        f"{len(found.flagged):,} of {total:,} captions (!) score above 99% of the {plain} control captions, "
        f"{chance:.3g} would by chance; AUC {found.auc:.3f}.",
        f"List: {escape(str(found.written))}",
    )
