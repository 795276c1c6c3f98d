"""Devices of the processes of a test: a GPU each if there are enough of them, otherwise the CPU.

With SHARE_GPUS=1 the groups of ``harness`` share what GPUs there are, by gloo: slow, but all of a step but NCCL.

What is compared must be computed alike: one process that others are compared with is placed as the largest group of the
comparison is, even where a GPU for one process would be free.
"""

from __future__ import annotations

import os

import torch
from forked import ON_CPU

GPUS = torch.cuda.device_count()
"""GPUs of this machine, as in CUDA_VISIBLE_DEVICES. Counting starts no CUDA context in the tests' own process."""
SHARED = os.environ.get("SHARE_GPUS") == "1"


def on_gpus(processes: int, gpus: int = GPUS, *, shared: bool = SHARED) -> bool:
    """Return true if ``processes`` that compute together have a GPU each; NCCL has no place for two of them on one."""
    return gpus >= processes or (shared and gpus > 0)


def environment(processes: int, gpus: int = GPUS) -> dict[str, str]:
    """Environment of ``processes`` that compute together, set before they import torch.

    On the CPU nothing finds a GPU: not torch, FSDP's default mesh, DeepSpeed's accelerator or Accelerate.
    """
    if on_gpus(processes, gpus):
        # With TF32 in convolutions, parts of a batch would differ from the whole in the fourth digit.
        return {"DS_ACCELERATOR": "cuda", "NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return dict(ON_CPU)
