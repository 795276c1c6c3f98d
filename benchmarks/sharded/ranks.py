"""Processes of their own for each measurement, so that none finds what another has left in memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 600
BARE_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""For glibc: what is freed leaves the process. For oneDNN: no copies of weights, packed for a CPU's bf16 instructions.
Both cost time, and leave a step's own memory to a process's peak.
"""


def run_ranks(
    measurement: str, ranks: int, *, device: str = "cpu", bare: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Results of ``measure.MEASUREMENTS[measurement](**options)`` on each of ``ranks`` processes.

    device:    "cpu", with gloo, or "cuda", with NCCL and a GPU for each
    bare:      with ``BARE_MEMORY``

    Raises ``RuntimeError`` with the first failed rank's errors; all others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                **(BARE_MEMORY if bare else {}),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": device,
                **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(Path(__file__).with_name("measure.py")), measurement]
            command += [json.dumps(options), str(Path(folder, f"{rank}.json"))]
            with Path(folder, f"{rank}.log").open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank, code in enumerate(codes):
            if code:
                raise RuntimeError(f"rank {rank} of {measurement}:\n{Path(folder, f'{rank}.log').read_text()[-4000:]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
