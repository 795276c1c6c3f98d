"""Helpers of all tests: run a command in this process, read a checkpoint's tensors, gradients of a step's losses."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Ended(NamedTuple):
    """A command that ended: its exit code, standard output and standard error."""

    code: object
    output: str
    errors: str


def without_verdict(arguments: Iterable[object]) -> list[str]:
    """Arguments of a command, of which a run of a few steps, that forgets nothing, is not judged for it."""
    given = list(map(str, arguments))
    is_judged = {"--verdict", "--no-verdict", "--help"} & set(given)
    return [*given, "--no-verdict"] if given[:1] == ["unlearn"] and not is_judged else given


def run_command(*arguments: object) -> object:
    """Run the command line in this process and return its exit code; runs have a verdict with ``--verdict`` alone."""
    # Here, since the kernels' tests run where nothing but the kernels is installed.
    from erasediff.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["erasediff", *without_verdict(arguments)])
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


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """One float64 vector of all elements."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradients_at(
    model: nn.Module, process: Any, retain: Any, forget: Any, target: Any, step: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, g, L_f) at the model's weights, with the noise of step ``step`` of a solver with seed 0."""
    from erasediff.diffusion import DenoisingObjective, micro_batches, noise_key

    objective = DenoisingObjective(process=process)
    key = noise_key(0, step, "cpu")
    twin = copy.deepcopy(model)
    objective.retain_loss(twin, *micro_batches(retain)[0], key=key).backward()
    r = flat(parameter.grad for parameter in twin.parameters())
    twin.zero_grad()
    loss = objective.forget_loss(twin, target, *micro_batches(forget)[0], key=key)
    loss.backward()
    return r, flat(parameter.grad for parameter in twin.parameters()), loss.detach()
