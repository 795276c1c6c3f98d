"""Results file: JSON lines, each with its case, settings, versions and machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from erasediff.io.jsonl import MetricsFile
from erasediff.utils.versions import library_versions


class ResultsFile:
    """Results of a comparison as JSON lines; a measurement that has a line is not taken again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MetricsFile(path)

    def read(self) -> list[dict[str, Any]]:
        return list(self.file.read())

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Return true if a line has all entries of ``identity``."""
        return any(identity.items() <= line.items() for line in self.read())

    def append(self, line: Mapping[str, Any]) -> None:
        """Append ``line`` with its environment. UserError if the disk refuses."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file.append([{**line, **environment()}])


def environment() -> dict[str, Any]:
    """Time, versions, machine and its load: on a shared machine, only CPU seconds can be compared."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "versions": library_versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "load": round(os.getloadavg()[0], 1),
    }


def _commit() -> str | None:
    """Commit of this code, with + if the tree differs from it; None outside of a repository."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return model[1] if model else platform.processor() or platform.machine()
