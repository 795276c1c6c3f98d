"""Helpers of all tests: run a command in this process, read the tensors of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor


class Ended(NamedTuple):
    """A command that ended: its exit code, standard output and standard error."""

    code: object
    output: str
    errors: str


def run_command(*arguments: object) -> object:
    """Run the command line in this process and return its exit code."""
    # Here, since the kernels' tests run where nothing but the kernels is installed.
    from erasediff.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["erasediff", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code


def succeed(*arguments: object) -> None:
    """Run the command line in this process; it has to end with exit code 0."""
    assert run_command(*arguments) == 0


def folder_weights(model: Path) -> dict[str, Tensor]:
    """Every tensor of a diffusers folder, by its component and name."""
    return {
        f"{file.parent.name}.{name}": tensor
        for file in sorted(model.glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }
