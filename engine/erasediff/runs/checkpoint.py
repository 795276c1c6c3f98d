"""One checkpoint: a folder with the state, and a manifest whose checksums tell damage from health."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erasediff.errors import UserError
from erasediff.runs.atomic import atomic_directory
from erasediff.runs.state import load_state, save_state

PREFIX = "checkpoint-"
STATE = "state.safetensors"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, order=True)
class Checkpoint:
    """The state of a run after ``step`` steps, at ``path``."""

    step: int
    path: Path

    @classmethod
    def at(cls, path: Path) -> "Checkpoint":
        """The checkpoint that the folder ``path`` is named for. UserError if its name is not that of one."""
        number = path.name.removeprefix(PREFIX)
        if not path.name.startswith(PREFIX) or not number.isdecimal():
            raise UserError(f"{path} is not a checkpoint: checkpoints are folders called {PREFIX}<step>.")
        return cls(int(number), path)

    @classmethod
    def of_run(cls, folder: Path) -> list["Checkpoint"]:
        """The checkpoints in a run's folder, oldest first."""
        paths = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
        return sorted(cls.at(path) for path in paths)

    def save(self, state: Any) -> None:
        """Write ``state``; the folder appears whole or not at all, and replaces one of the same step."""
        with atomic_directory(self.path, replace=True) as folder:
            save_state(state, folder / STATE)
            manifest = {"step": self.step, "sha256": {STATE: _checksum(folder / STATE)}}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The state, tensors on ``device``. UserError if any of it is not as it was written."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            healthy = manifest["step"] == self.step and all(
                _checksum(self.path / name) == checksum for name, checksum in manifest["sha256"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            healthy = False
        if not healthy:
            raise UserError(f"The checkpoint {self.path} is damaged{self._way_out()}.")
        return load_state(self.path / STATE, device)

    def _way_out(self) -> str:
        older = [checkpoint for checkpoint in self.of_run(self.path.parent) if checkpoint.step < self.step]
        return f"; continue from the one before it with --resume {older[-1].path}" if older else ""


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
