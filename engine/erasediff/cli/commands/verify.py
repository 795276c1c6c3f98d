from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.text import Text

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages
from erasediff.errors import RunFailedError

if TYPE_CHECKING:
    from erasediff.provenance.faults import Fault

SHOWN = 200
"""Faults that are printed: another model has one in each of its tensors."""


def verify(
    run: Annotated[Path, typer.Argument(help="The folder of a run that has ended.")],
    base: Annotated[
        Path | None, typer.Option(help="The model that was unlearned from; by default where the receipt says it is.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The images, to hash each again; by default the lists of them alone are.")
    ] = None,
    signer: Annotated[
        Path | None, typer.Option(help="Allowed signers, as of ssh-keygen: one of them must have signed the receipt.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Verify a run against its receipt: every hash and figure is derived again, and each fault is a line.

    Exit codes: 0 everything is as the receipt says; 2 there is no receipt, or not what the run read; 3 something is
    not as the receipt says.
    """
    with loading(messages):
        from erasediff.provenance.verification import verify_run
    with messages.status("Hashing"):
        result = verify_run(run, base=base, data=data, signers=signer)
    for note in result.notes:
        messages.print(note, highlight=False, markup=False, soft_wrap=True)
    emit(
        {"verified": not result.faults, **asdict(result)},
        as_json=as_json,
        shown=Group(*_lines(result.faults)) if result.faults else Text("Everything is as the receipt says."),
    )
    if result.faults:
        raise RunFailedError(f"The run in {run} is not what its receipt says: {len(result.faults):,} faults.")


def _lines(faults: "list[Fault]") -> list[Text]:
    rest = len(faults) - SHOWN
    lines = [Text(_printable(str(fault)), overflow="ignore", no_wrap=True) for fault in faults[:SHOWN]]
    return [*lines, Text(f"and {rest:,} more; --json lists them all.")] if rest > 0 else lines


def _printable(line: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
