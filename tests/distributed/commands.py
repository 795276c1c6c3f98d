"""The command line in processes of its own, as the tests of this folder run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from placing import environment
from safetensors.torch import load_file
from torch import Tensor

SECONDS = 240
WIDEST = 3
"""Processes of the largest run that others are compared with."""
TINY = """
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
train: {steps: 20, batch_size: 12}
unlearn: {forget: [3], steps: 12, batch_size: 12, lr: 1.0e-5, lr_schedule: constant, target: gaussian}
run: {checkpoint_every: 4, keep_checkpoints: 9, log_every: 1}
"""


def start(
    *arguments: object, launcher: tuple[str, ...] = ("-m", "erasediff.cli"), widest: int = WIDEST
) -> subprocess.Popen[str]:
    """``erasediff`` with ``arguments``, by itself or as ``launcher`` starts it, placed as ``widest`` processes are."""
    command = [sys.executable, *launcher, *map(str, arguments)]
    variables = {**os.environ, **environment(widest), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """(output, errors) of a command that ends with ``code``."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code, f"ended with {process.returncode}:\n{errors[-4000:]}"
    return output, errors


def run(*arguments: object, code: int = 0, **options: Any) -> tuple[str, str]:
    return finish(start(*arguments, **options), code)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that ``--launch`` has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children))


def curve(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
