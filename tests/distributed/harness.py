"""Groups of processes that are started once for each world size and then take one job after another.

Joining a process group takes a second: a group is kept for all tests. A rank that raises or dies fails the job with its
own traceback, and ends its group; so does a job that takes too long. Where they compute: see ``placing``.

Ranks on the CPU are forked, see ``forked``. What ranks on GPUs find in their environment must be there before torch is
imported: they start by themselves.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from forked import PRELOADED, preloaded_context
from placing import GPUS, environment, on_gpus

SECONDS = 120


class RankFailed(AssertionError):
    """A job that did not end well on every rank, with what each of them said."""


class Group:
    """``size`` processes with one process group, placed as ``widest`` processes (``size`` by default) would be."""

    def __init__(self, size: int, widest: int | None = None) -> None:
        self.size = size
        self.kind = "GPU" if on_gpus(widest or size) else "CPU"
        variables = environment(widest or size)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = preloaded_context() if self.kind == "CPU" else multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            # From the first: torch, once it has asked the driver, no longer looks at what GPUs are to be visible.
            with mock.patch.dict(os.environ, variables):
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, file: Path, function: str, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """Results of ``function(*arguments)`` of the module ``file`` on each rank."""
        for pipe in self.pipes:
            pipe.send((file, function, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < self.size and all(is_good for is_good, _ in answers.values()):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                silent = sorted(set(range(self.size)) - set(answers))
                raise RankFailed(f"ranks {silent} of {self.size} ({self.kind}) took over {seconds} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join()
                    answers[rank] = False, f"died with exit code {self.processes[rank].exitcode}"
        failures = [
            f"rank {rank} of {self.size} ({self.kind}): {answer}"
            for rank, (is_good, answer) in answers.items()
            if not is_good
        ]
        if failures:
            self.close()
            raise RankFailed("\n".join(failures))
        return [answers[rank][1] for rank in range(self.size)]

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()


def load(file: Path) -> ModuleType:
    """The module in ``file``, with ``file``'s folder to import from."""
    name = f"distributed_tests_{file.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % max(1, GPUS)),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    import torch
    import torch.distributed as dist
    from torch.utils._pytree import tree_map_only

    torch.set_num_threads(1)
    backend = "gloo"
    if os.environ["DS_ACCELERATOR"] == "cuda":
        # Stops and the like are agreed on with tensors of the CPU.
        backend = "cpu:gloo,cuda:nccl" if size <= GPUS else "cpu:gloo,cuda:gloo"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Some tests are about bits. What cannot be the same in each run says so, by its name.
        torch.use_deterministic_algorithms(True, warn_only=True)
    else:
        assert sys.modules.keys() >= set(PRELOADED), "what this rank is forked from could not import its modules"
    assert torch.cuda.is_available() == ("cuda" in backend), "this rank sees GPUs where it is to see none, or none"
    dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS))
    while True:
        try:
            file, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(load(file), function)(*arguments)
            # Not as handles of this process's memory on a device.
            result = tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), result)
        except Exception:  # noqa: BLE001
            pipe.send((False, traceback.format_exc()))
        else:
            pipe.send((True, result))
