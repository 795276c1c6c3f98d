"""Run one case of a comparison (method, task, seed) by the command line in its own process."""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write, remove_directory
from erasediff.io.cache_dir import ENVIRONMENT_VARIABLE, cache_folder
from erasediff.io.json_file import read_object
from erasediff.methods.sparse_autoencoder import ERASER
from erasediff.sae.eraser import WEIGHTS
from erasediff.training.run_dir import MODEL

COST, LOG = "cost.json", "unlearn.log"
POLL_INTERVAL = 0.2
"""Seconds between readings of the peak memory, which only grows."""

ARTEFACTS = ("mask.safetensors", "lora.safetensors", f"{ERASER}/{WEIGHTS}")


class FailedRun(UserError):
    """A run of a case ended with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Cost of a run.

    Attributes:
        seconds, cpu_seconds: Of the whole process, imports and saving included.
        training_seconds: Wall-clock time of the steps alone; other work on the machine makes it longer.
        peak_bytes: Peak resident memory of the process, on Linux; None elsewhere.
        artefact_bytes: Size of what turns the original model into the result: the mask, the LoRA or the eraser
            where the method leaves one, otherwise the tensors that changed.
    """

    seconds: float
    cpu_seconds: float
    training_seconds: float
    peak_bytes: int | None
    artefact_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Case of a comparison.

    Attributes:
        task: Name of the task.
        method: Name of the method; None for the base model.
        seed: Seed of the run.
        settings: Settings by their dotted names, as for ``--set``.
    """

    task: str
    method: str | None
    seed: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.task.replace('/', '-')}-{self.method or 'base'}-{self.seed}-{self.fingerprint}"

    @property
    def fingerprint(self) -> str:
        """Hash of method and settings."""
        described = json.dumps([self.method, dict(sorted(self.described().items()))], default=str)
        return hashlib.sha256(described.encode()).hexdigest()[:8]

    def described(self) -> dict[str, Any]:
        """Settings for results files: paths into the cache begin with its environment variable."""
        cache = str(cache_folder())
        return {
            name: value.replace(cache, f"${ENVIRONMENT_VARIABLE}") if isinstance(value, str) else value
            for name, value in self.settings.items()
        }

    def identity(self) -> dict[str, Any]:
        """Key of the case's lines in the results file."""
        return {"task": self.task, "method": self.method or "base", "seed": self.seed, "settings": self.fingerprint}


def run_case(case: Case, base: Path, runs: Path) -> tuple[Path, Cost | None]:
    """Run a case from ``base``, unless its folder in ``runs`` is finished; return the model and its cost.

    Of a method that leaves the model as it was, the folder ``ERASER``, to be attached to ``base``. A run that was cut
    short begins again, so that its cost is that of a whole one. FailedRun if the command fails.
    """
    if case.method is None:
        return base, None
    run = runs / case.name
    if not (run / COST).exists():
        remove_directory(run)
        cost = _run(case, base, run)
        atomic_write(run / COST, json.dumps(asdict(cost)) + "\n")
    product = ERASER if (run / ERASER).exists() else MODEL
    return run / product, _read_cost(run / COST)


def _read_cost(path: Path) -> Cost:
    try:
        # As JSON: of Python's values, strict mode takes a ``Cost`` alone.
        return TypeAdapter(Cost).validate_json(json.dumps(read_object(path)), strict=True)
    except ValidationError:
        raise UserError(f"{path} is no cost of a run: remove its folder, and the run is made again.") from None


def _run(case: Case, base: Path, run: Path) -> Cost:
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.parent / f"{case.name}.log"
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = None
    with log.open("w") as errors:
        process = subprocess.Popen(
            command(case, base, run), stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True
        )
        while True:
            try:
                printed, _ = process.communicate(timeout=POLL_INTERVAL)
                break
            except subprocess.TimeoutExpired:
                peak = _peak_bytes(process.pid) or peak
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        messages = log.read_text().strip().splitlines() or ["no message"]
        raise FailedRun(f"{case.name} ended with exit code {process.returncode}: {messages[-1]}")
    result = json.loads(printed)
    log.replace(run / LOG)
    return Cost(
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        training_seconds=result["seconds"],
        peak_bytes=peak,
        artefact_bytes=artefact_bytes(base, run),
    )


def _peak_bytes(process: int) -> int | None:
    """Peak resident memory (VmHWM) of a running process; ru_maxrss may be that of its parent, if it is larger."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return None
    peaks = [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")]
    return peaks[0] if peaks else None


def command(case: Case, base: Path, run: Path) -> Sequence[str]:
    """Command line of a case."""
    assert case.method is not None
    settings = {"unlearn.model": str(base), "unlearn.method": case.method, "seed": case.seed} | dict(case.settings)
    assignments = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    return [sys.executable, "-m", "erasediff.cli", "unlearn", "--no-verdict", *assignments, "--out", str(run), "--json"]


def artefact_bytes(base: Path, run: Path) -> int:
    """Size in bytes of the mask, LoRA or eraser in ``run``, or of its model's tensors that differ from ``base``."""
    for name in ARTEFACTS:
        if (run / name).exists():
            return (run / name).stat().st_size
    changed = 0
    for file in sorted((run / MODEL).rglob("*.safetensors")):
        with safe_open(file, "pt") as new, safe_open(base / file.relative_to(run / MODEL), "pt") as old:
            for name in new.keys():  # noqa: SIM118
                tensor = new.get_tensor(name)
                if not torch.equal(tensor, old.get_tensor(name)):
                    changed += tensor.nbytes
    return changed
