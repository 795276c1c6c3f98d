from pathlib import Path
from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import loading, messages


def mask(
    model: Annotated[Path, typer.Option(help="The original to prune, or with --restore-from the pruned model.")],
    mask: Annotated[Path, typer.Option(help="The mask.safetensors of a pruning run.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    restore_from: Annotated[
        Path | None, typer.Option(help="The original model, whose weights are restored where the mask pruned them.")
    ] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
) -> None:
    """Apply a pruning's mask to a text-to-image model, or undo it with the original's weights.

    A mask says which weights are left out, not what they were: undoing it takes the original model.
    """
    full_config = options.configure(config, settings)
    with loading(messages):
        from erasediff.workflows.load_model import mask_model
    mask_model(full_config, model, mask, out, restore_from)
    messages.print(f"Written to {out}.")
