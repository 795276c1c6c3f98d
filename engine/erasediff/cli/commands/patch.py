from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages, results_alone_on_stdout

Patch = Annotated[Path, typer.Argument(help="A file of patch make.")]
Out = Annotated[Path, typer.Option(help="The checkpoint to write, in the layout that it had.")]

patch = typer.Typer(
    help="Write the difference of two checkpoints as a small file, and apply or revert it bit for bit.",
    no_args_is_help=True,
)


@patch.command()
@results_alone_on_stdout
def make(
    base: Annotated[Path, typer.Argument(help="A diffusers folder, or a .safetensors file.")],
    model: Annotated[Path, typer.Argument(help="What was made of it, in the same layout.")],
    out: Annotated[Path, typer.Option(help="The patch, a .safetensors file.")],
    as_json: options.Json = False,
) -> None:
    """Write the difference of MODEL from BASE: the tensors that changed, as compressed bits."""
    with loading(messages):
        from erasediff.provenance.make_patch import make_patch
    with messages.status("Comparing"):
        summary = make_patch(base, model, out)
    emit({**asdict(summary), "patch": str(summary.patch)}, as_json=as_json)


@patch.command()
@results_alone_on_stdout
def apply(
    base: Annotated[Path, typer.Argument(help="The base that the patch was made of.")], patch: Patch, out: Out
) -> None:
    """Make the model of its base. Another base is refused by its first tensor."""
    _apply(base, patch, out, is_reverted=False)


@patch.command()
@results_alone_on_stdout
def revert(
    model: Annotated[Path, typer.Argument(help="The model that the patch makes.")], patch: Patch, out: Out
) -> None:
    """Make the base of the model. Another model is refused by its first tensor."""
    _apply(model, patch, out, is_reverted=True)


def _apply(source: Path, patch: Path, out: Path, *, is_reverted: bool) -> None:
    with loading(messages):
        from erasediff.provenance.apply_patch import apply_patch
    with messages.status("Writing"):
        apply_patch(source, patch, out, revert=is_reverted)
    messages.print(f"Written to {out}.", markup=False, highlight=False)
