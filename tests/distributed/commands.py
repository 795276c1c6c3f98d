"""The command line in processes of its own, as the tests of this folder run it.

On the CPU the first of them is forked from one that has imported its libraries, unless a test asks for a new
interpreter; the ranks that it launches always are new ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forked import Forked, erasediff
from helpers import without_verdict
from placing import environment, on_gpus
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


CLI = ("-m", "erasediff.cli")


def start(
    *arguments: object, launcher: tuple[str, ...] = CLI, widest: int = WIDEST, new_interpreter: bool = False
) -> subprocess.Popen[str] | Forked:
    """``erasediff`` with ``arguments``, by itself or as ``launcher`` starts it, placed as ``widest`` processes are."""
    asked = without_verdict(arguments)
    variables = {**os.environ, **environment(widest), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if launcher == CLI and not new_interpreter and not on_gpus(widest):
        return Forked(erasediff, asked, variables)
    command = [sys.executable, *launcher, *asked]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str] | Forked, code: int = 0) -> tuple[str, str]:
    """(output, errors) of a command that ends with ``code``."""
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == code, f"ended with {process.returncode}:\n{errors[-4000:]}"
    return output, errors


def run(*arguments: object, code: int = 0, **options: Any) -> tuple[str, str]:
    return finish(start(*arguments, **options), code)


def ranks_of(process: subprocess.Popen[str] | Forked) -> list[int]:
    """The processes that ``--launch`` has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children))


def curve(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")
