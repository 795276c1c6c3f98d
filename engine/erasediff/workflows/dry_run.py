"""Dry run: size and cost of a run, measured on trial steps in memory; nothing is written."""

import resource
import sys
import time
from dataclasses import dataclass

import torch

from erasediff.planning.step_plan import Pass, StepPlan
from erasediff.training.job import TrainingJob
from erasediff.utils.timing import wait_for
from erasediff.workflows.record_passes import step_plan

TRIAL_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """Cost of a run, measured on a few steps.

    Attributes:
        method: Name of the method.
        device: Device of the network.
        passes: Network passes per step, as ``erasediff plan`` counts them; empty among several processes.
        parameters, parameters_trained: Numbers of elements.
        steps: Steps of the whole run.
        state_bytes: Bytes of weights and optimizer state.
        peak_bytes: Peak of the process on a CPU, of the allocator on a GPU.
        seconds_per_step: Mean of the trial steps after the first.
        seconds: Seconds of the whole run.
    """

    method: str
    device: str
    passes: str
    parameters: int
    parameters_trained: int
    steps: int
    state_bytes: int
    peak_bytes: int
    seconds_per_step: float
    seconds: float


def dry_run(job: TrainingJob) -> DryRun:
    """Take a few steps of ``job`` in memory and scale them up. The job is of no use afterwards."""
    device = next(job.network.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trial = job.trial_steps(TRIAL_STEPS)
    next(trial)
    wait_for(device)
    began = time.perf_counter()
    for _ in trial:
        pass
    wait_for(device)
    seconds_per_step = (time.perf_counter() - began) / (TRIAL_STEPS - 1)
    parameters = list(job.network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer_tensors = [
        tensor for state in job.optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
    ]
    steps = job.rate.steps
    return DryRun(
        method=job.method.name,
        device=str(device),
        passes=_passes(job),
        parameters=sum(parameter.numel() for parameter in parameters),
        parameters_trained=sum(parameter.numel() for parameter in trained),
        steps=steps,
        state_bytes=sum(tensor.nbytes for tensor in [*parameters, *optimizer_tensors]),
        peak_bytes=_peak_bytes(device),
        seconds_per_step=seconds_per_step,
        seconds=seconds_per_step * steps,
    )


def _passes(job: TrainingJob) -> str:
    if job.config.distributed.launch != "none":
        return ""
    if job.forget is not None:
        return step_plan(job.config).describe()
    size = job.config.train.batch_size
    return StepPlan(batch_size=size, passes=(Pass(data="retain", rows=size),)).describe()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
