"""Measurement of one rank: ``measure.py NAME OPTIONS_AS_JSON OUT``, started by ``ranks.run_ranks``."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from workload import erasediff, fine_tuning

CONTENDERS = {
    "erasediff": erasediff,
    "deepspeed": fine_tuning,
    "deepspeed, two micro-batches": functools.partial(fine_tuning, accumulation=2),
}


def memory(size: str, stage: int, per_rank: int, **options: Any) -> dict[str, Any]:
    """The most that two steps take beyond what the process had before the engine was made."""
    options["autocast"] = True
    warm_up = erasediff("15M", stage, 2, **options)
    warm_up()
    del warm_up
    gc.collect()
    before = resident("VmRSS")
    step = erasediff(size, stage, per_rank, **options)
    # The whole model is there while an engine shards it: that peak is one of loading, not of steps.
    step()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    return {"peak_bytes": resident("VmHWM") - before}


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is what is there now, VmHWM the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def volume(size: str, stage: int, per_rank: int) -> dict[str, Any]:
    """Bytes that each contender hands to collectives in its third step, by kind.

    Of a gather or scatter, the whole; of an exchange, what the process sends, its own part included.
    """
    found = {}
    for contender, make in CONTENDERS.items():
        step = make(size, stage, per_rank)
        step()
        step()
        with CollectiveBytes() as counter:
            step()
        found[contender] = {"bytes": dict(counter.bytes), "calls": dict(counter.calls)}
    return found


class CollectiveBytes(TorchDispatchMode):
    """Counts at torch's dispatcher, below whatever wraps ``torch.distributed``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0].strip("_")
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            whole = max(tensors, key=lambda tensor: tensor.nbytes, default=None)
            if name.startswith("alltoall"):
                _received, whole = tensors
            if whole is not None:
                is_list = name in ("allgather", "reduce_scatter")
                self.bytes[name] += whole.nbytes * (dist.get_world_size() if is_list else 1)
                self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def throughput(size: str, stage: int, per_rank: int, turns: int, **options: Any) -> dict[str, Any]:
    """Seconds and this process's CPU seconds of each turn of each contender; they take turns in the same processes.

    On a GPU also the most that torch allocates there in a step, beyond what is there before it.
    """
    names = list(CONTENDERS)
    steps = {}
    held: dict[str, int] = {}
    for name in names:
        before = allocated()
        steps[name] = CONTENDERS[name](size, stage, per_rank, **options)
        steps[name]()
        held[name] = allocated() - before
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for turn in range(-2, turns):
        for name in names if turn % 2 else reversed(names):
            before = allocated()
            finished()
            begun, cpu_begun = time.perf_counter(), time.process_time()
            steps[name]()
            finished()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begun)
                cpu_seconds[name].append(time.process_time() - cpu_begun)
            if torch.cuda.is_available():
                peaks[name] = held[name] + torch.cuda.max_memory_allocated() - before
                torch.cuda.reset_peak_memory_stats()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peaks}


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def finished() -> None:
    """All ranks have done all that they were told to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


MEASUREMENTS = {"memory": memory, "volume": volume, "throughput": throughput}


def main() -> None:
    name, options, out = sys.argv[1:]
    torch.set_num_threads(1)

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    result = MEASUREMENTS[name](**json.loads(options))
    Path(out).write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    main()
