"""Benchmark of an EraseDiff step against plain fine-tuning on as many samples, in turns; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from erasediff.diffusion.batch import Batch
from erasediff.errors import UserError
from erasediff.methods import FineTune
from erasediff.methods.erasediff import EraseDiff
from erasediff.planning.trace import flop_counter
from erasediff.training.job import TrainingJob, precision_of
from erasediff.utils.timing import Stopwatch, TransientPeak, matmul_flops_per_second, wait_for
from erasediff.workflows.record_passes import step_plan

WARM_UP_TURNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Cost per step of one method.

    Attributes:
        samples: Samples per step.
        seconds: Median over the turns; ``first_quartile`` and ``third_quartile`` are their spread.
        flops: FLOPs of the network in one step as it runs, checkpointing's second forward included; what custom
            attention kernels do is not seen.
        flops_utilisation: FLOPs per second, as a share of the matrix product's in the same turns.
        peak_bytes: Weights, this contender's own optimizer state, and the transient peak of a step; None where the
            system does not tell.
        update_share: Gram values, multiplier and update, as a share of the step's time; None for fine-tuning.
        times_fine_tuning: Median over turns of the ratio to fine-tuning's time.
    """

    name: str
    samples: int
    seconds: float
    first_quartile: float
    third_quartile: float
    samples_per_second: float
    flops: int
    flops_utilisation: float
    peak_bytes: int | None
    update_share: float | None
    times_fine_tuning: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Benchmark of all contenders on one machine.

    Attributes:
        passes: Network passes of an EraseDiff step, as ``erasediff plan`` counts them.
        matmul_flops_per_second: FLOP/s of a square product in ``precision``.
    """

    device: str
    threads: int
    precision: str
    passes: str
    parameters: int
    parameters_trained: int
    turns: int
    matmul_flops_per_second: float
    contenders: tuple[Contender, ...]


def bench(job: TrainingJob, *, turns: int, progress: Callable[[], object] = lambda: None) -> Bench:
    """Benchmark a step of ``job`` against plain fine-tuning in turns. The job is of no use afterwards.

    Both train the same weights on the same samples: EraseDiff half of them as retained and half as forgotten,
    fine-tuning all of them in one batch, with torch's AdamW (fused where it can be). The first turns warm up.
    UserError unless the job's method is EraseDiff, and for several processes.
    """
    method = job.method
    if not isinstance(method, EraseDiff) or job.forget is None:
        raise UserError("bench measures --method erasediff beside fine-tuning: omit --method.")
    if method.gradients.world.size > 1:
        raise UserError("bench measures one process: omit --launch. benchmarks/sharded/ measures several.")
    device, forget = method.device, job.forget
    parameters = list(job.network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    precision = precision_of(job.config) or trained[0].dtype
    plain = _fine_tuning(method, trained)
    steps: dict[str, Callable[[int], object]] = {
        "erasediff": lambda turn: method.step(job.retain.at(turn), forget.at(turn)),
        "fine-tuning": lambda turn: plain.step(_joined(job.retain.at(turn), forget.at(turn))),
    }
    samples = len(job.retain.at(0)["sample"]) + len(forget.at(0)["sample"])
    states = {"erasediff": method.optimizer, "fine-tuning": plain.optimizer}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    flops: dict[str, int] = {}
    grams, updates, products = Stopwatch(device), Stopwatch(device), []
    # The update is everything beyond the two gradients; the multiplier between these two is a few 0-D operations.
    method._values = grams.timed(method._values)  # type: ignore[method-assign]
    method.gradients.update = updates.timed(method.gradients.update)  # type: ignore[method-assign]
    for turn in range(-WARM_UP_TURNS, turns):
        for name in steps if turn % 2 else reversed(steps):
            if turn == -1:
                with flop_counter() as counter:
                    steps[name](0)
                flops[name] = counter.get_total_flops()
                continue
            with TransientPeak(device) as peak:
                began = time.perf_counter()
                steps[name](max(turn, 0))
                wait_for(device)
                elapsed = time.perf_counter() - began
            if turn >= 0:
                seconds[name].append(elapsed)
                peaks[name].extend([] if peak.bytes is None else [peak.bytes])
        products.append(matmul_flops_per_second(device, precision))
        progress()
    fastest = max(products)
    parts = zip(grams.seconds()[-turns:], updates.seconds()[-turns:], seconds["erasediff"], strict=True)
    update_shares = [(gram + update) / whole for gram, update, whole in parts]
    return Bench(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        precision=str(precision).removeprefix("torch."),
        passes=step_plan(job.config).describe(),
        parameters=sum(parameter.numel() for parameter in parameters),
        parameters_trained=sum(parameter.numel() for parameter in trained),
        turns=turns,
        matmul_flops_per_second=fastest,
        contenders=tuple(
            Contender(
                name=name,
                samples=samples,
                seconds=median(taken),
                first_quartile=quantiles(taken, n=4)[0],
                third_quartile=quantiles(taken, n=4)[2],
                samples_per_second=samples / median(taken),
                flops=flops[name],
                flops_utilisation=flops[name] / median(taken) / fastest,
                peak_bytes=_held(parameters, states[name]) + max(peaks[name]) if peaks[name] else None,
                update_share=median(update_shares) if name == "erasediff" else None,
                times_fine_tuning=median(a / b for a, b in zip(taken, seconds["fine-tuning"], strict=True)),
            )
            for name, taken in seconds.items()
        ),
    )


def _fine_tuning(method: EraseDiff, trained: list[torch.nn.Parameter]) -> FineTune:
    objective, group = method.objective, method.optimizer.param_groups[0]
    return FineTune(
        method.model,
        torch.optim.AdamW(trained, lr=group["lr"], weight_decay=group["weight_decay"], fused=True),
        process=objective.process,
        denoiser=objective.denoiser,
        min_snr_gamma=objective.min_snr_gamma,
        antithetic=objective.antithetic,
        max_grad_norm=method.max_grad_norm,
        accumulation_steps=method.accumulation_steps,
        autocast=method.autocast,
        seed=method.seed,
    )


def _joined(retain: Batch, forget: Batch) -> Batch:
    return {name: torch.cat([tensor, forget[name]]) for name, tensor in retain.items()}


def _held(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the weights and of one optimizer's state."""
    state: list[Mapping[str, Any]] = list(optimizer.state.values())
    tensors = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*parameters, *tensors])
