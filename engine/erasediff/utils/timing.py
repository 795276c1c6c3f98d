"""Timers, transient peak memory, and matrix-product throughput of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the measured matrices."""


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Stopwatch of a function's calls, in device time, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._calls: list[tuple[torch.cuda.Event, torch.cuda.Event] | float] = []

    def timed(self, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap ``function`` so that its calls are timed."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                result = function(*args, **kwargs)
                end.record()
                self._calls.append((begin, end))
            else:
                began = time.perf_counter()
                result = function(*args, **kwargs)
                self._calls.append(time.perf_counter() - began)
            return result

        return call

    def seconds(self) -> list[float]:
        """Seconds of all calls so far; waits for the device."""
        wait_for(self.device)
        return [call if isinstance(call, float) else call[0].elapsed_time(call[1]) / 1e3 for call in self._calls]


class TransientPeak:
    """Peak memory of a block beyond the memory in use at its beginning, in ``bytes``; None if it is unknown.

    On a GPU that of the allocator; on a CPU the resident memory of the process, on Linux.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif RESET.exists():
            RESET.write_text("5")
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _resident("VmHWM")
        self.bytes = max(0, peak - self._before)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of one product of square matrices in ``dtype``."""
    side = SIDE[device.type]
    # Not of constants: a GPU multiplies those faster.
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(first, second)
    wait_for(device)
    began = time.perf_counter()
    torch.mm(first, second)
    wait_for(device)
    return 2 * side**3 / (time.perf_counter() - began)


def _resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is the resident memory, VmHWM its peak since the reset."""
    return next(int(line.split()[1]) << 10 for line in STATUS.read_text().splitlines() if line.startswith(name))
