"""A run's folder: its configuration, its metrics, its checkpoints, and in the end its model."""

from pathlib import Path
from typing import Any

import torch

from erasediff.config import Config, differences, load_config
from erasediff.errors import UserError
from erasediff.runs.atomic import atomic_write, remove_directory, remove_leftovers
from erasediff.runs.checkpoint import PREFIX, Checkpoint
from erasediff.runs.metrics import MetricsFile

LATEST = "latest"


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``checkpoint-N/`` and ``model/`` under one path."""

    def __init__(self, path: Path, resume_from: Checkpoint | None = None) -> None:
        self.path = path
        self.resume_from = resume_from
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.model = path / "model"

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Begin a run at ``path``. UserError if something is there already."""
        remove_leftovers(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is not empty: choose another --out, or continue its run with --resume latest.")
        atomic_write(path / "config.yaml", config.to_yaml())
        return cls(path)

    @classmethod
    def resume(cls, path: Path, config: Config, start: Checkpoint | None = None) -> "RunFolder":
        """Continue the run at ``path`` from ``start``, by default its newest checkpoint (none: from the beginning).

        UserError if there is no run, or if ``config`` asks for other results than the run's own configuration: only
        the ``run`` section may change, since a resumed run ends exactly where the uninterrupted one would have.
        """
        changed = [name for name in differences(cls.read_config(path), config) if not name.startswith("run.")]
        if changed:
            raise UserError(f"The run in {path} was started with another {' and '.join(changed)}: begin a new one.")
        remove_leftovers(path)
        atomic_write(path / "config.yaml", config.to_yaml())
        checkpoints = Checkpoint.of_run(path)
        start = start or (checkpoints[-1] if checkpoints else None)
        run = cls(path, start)
        run.metrics.cut_back(start.step if start else 0)
        return run

    @staticmethod
    def read_config(path: Path) -> Config:
        """The configuration of the run at ``path``. UserError if there is none."""
        if not (path / "config.yaml").is_file():
            raise UserError(f"There is no run to resume in {path}.")
        return load_config(path / "config.yaml")

    @property
    def finished(self) -> bool:
        """Whether the run has left its model."""
        return self.model.is_dir()

    def save_checkpoint(self, step: int, state: Any, *, keep: int) -> Checkpoint:
        """Write ``checkpoint-<step>``, then remove the oldest beyond ``keep``."""
        checkpoint = Checkpoint(step, self.path / f"{PREFIX}{step}")
        checkpoint.save(state)
        for old in Checkpoint.of_run(self.path)[:-keep]:
            remove_directory(old.path)
        return checkpoint

    def load_checkpoint(self, device: torch.device | str = "cpu") -> Any | None:
        """The state to resume from, or None at the beginning of a run."""
        return None if self.resume_from is None else self.resume_from.load(device)


def locate_run(resume: str, out: Path | None) -> tuple[Path, Checkpoint | None]:
    """Which run ``--resume`` means, and which checkpoint if it names one.

    ``latest`` is the newest checkpoint of the run at ``out``; a path is that of a run or of a checkpoint in one.
    """
    if resume == LATEST:
        if out is None:
            raise UserError("--resume latest needs --out: the folder of the run to continue.")
        return out, None
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"There is no run to resume in {path}.")
    checkpoint = Checkpoint.at(path) if path.name.startswith(PREFIX) else None
    run = path.parent if checkpoint else path
    if out is not None and out.resolve() != run.resolve():
        raise UserError(f"--resume {path} continues the run in {run}, but --out says {out}: leave --out away.")
    return run, checkpoint
