"""What a run would do and cost, measured on trial steps; nothing is written."""

import resource
import sys
import time
from dataclasses import dataclass

import torch

from erasediff.training.job import TrainingJob

TRIAL_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes in bytes, times in seconds. ``peak_bytes`` is the process's on a CPU, the allocator's on a GPU."""

    method: str
    device: str
    parameters: int
    parameters_trained: int
    steps: int
    state_bytes: int
    peak_bytes: int
    seconds_per_step: float
    seconds: float


def plan(session: TrainingJob) -> Plan:
    """Take a few steps of ``session`` in memory and scale them up. The session is of no use afterwards."""
    device = next(session.network.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    session.trial_step(0)
    _wait_for(device)
    began = time.perf_counter()
    for index in range(1, TRIAL_STEPS):
        session.trial_step(index)
    _wait_for(device)
    seconds_per_step = (time.perf_counter() - began) / (TRIAL_STEPS - 1)
    parameters = list(session.network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer_tensors = [
        tensor for state in session.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
    ]
    steps = session.rate.steps
    return Plan(
        method=session.method.name,
        device=str(device),
        parameters=sum(parameter.numel() for parameter in parameters),
        parameters_trained=sum(parameter.numel() for parameter in trained),
        steps=steps,
        state_bytes=sum(tensor.nbytes for tensor in [*parameters, *optimizer_tensors]),
        peak_bytes=_peak_bytes(device),
        seconds_per_step=seconds_per_step,
        seconds=seconds_per_step * steps,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
