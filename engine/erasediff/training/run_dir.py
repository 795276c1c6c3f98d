"""A run's folder: its configuration, its metrics, its checkpoints, and in the end its model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from erasediff.config import Config, differences, load_config
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write, remove_directory, remove_leftovers
from erasediff.io.jsonl import MetricsFile
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import PREFIX, Checkpoint

CONFIG = "config.yaml"
MODEL = "model"
SINGLE_FILE = "model.safetensors"
LATEST = "latest"
FREE = ("run.", "distributed.")
"""Settings that a resumed run may change: its results are the same."""


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``checkpoint-N/`` and ``model/`` or a single file under one path."""

    def __init__(self, path: Path, resume_from: Checkpoint | None = None) -> None:
        self.path = path
        self.resume_from = resume_from
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.model = path / MODEL

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Begin a run at ``path``. UserError if something is there already."""
        cls.check_free(path)
        atomic_write(path / CONFIG, config.to_yaml())
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """UserError if ``path`` holds something; what killed processes were still writing there is removed."""
        remove_leftovers(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is not empty: choose another --out, or continue its run with --resume latest.")

    @classmethod
    def resume(cls, path: Path, config: Config, start: Checkpoint | None = None) -> "RunFolder":
        """Continue the run at ``path`` from ``start``, by default its newest checkpoint (none: from the beginning).

        UserError if there is no run, or if ``config`` asks for other results than the run's own configuration: only
        the sections ``run`` and ``distributed`` may change, since a resumed run ends where the uninterrupted one would
        have.
        """
        changed = [name for name in differences(cls.read_config(path), config) if not name.startswith(FREE)]
        if changed:
            raise UserError(f"The run in {path} was started with another {' and '.join(changed)}: begin a new one.")
        remove_leftovers(path)
        atomic_write(path / CONFIG, config.to_yaml())
        start = start or Checkpoint.newest(path)
        run = cls(path, start)
        if run.finished and start is None:
            raise UserError(f"The run in {path} has finished and kept no checkpoint: its model lies there.")
        return run

    @staticmethod
    def read_config(path: Path) -> Config:
        """The configuration of the run at ``path``. UserError if there is none."""
        return load_config(_config_file(path))

    @property
    def begun(self) -> bool:
        """Whether there is a run to resume."""
        return (self.path / CONFIG).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run has left its model."""
        return self.model.is_dir() or (self.path / SINGLE_FILE).is_file()

    def save_checkpoint(self, step: int, save: Callable[[Checkpoint], None], *, keep: int) -> Checkpoint:
        """Have ``save`` write ``checkpoint-<step>``, then remove the oldest beyond ``keep``."""
        checkpoint = Checkpoint(step, self.path / f"{PREFIX}{step}")
        save(checkpoint)
        if ControlPlane.current().is_main:
            for old in Checkpoint.of_run(self.path)[:-keep]:
                remove_directory(old.path)
        return checkpoint


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where a run goes, or which run goes on and from which checkpoint (None: its newest)."""

    path: Path
    resuming: bool = False
    checkpoint: Checkpoint | None = None

    @classmethod
    def asked_for(cls, out: Path | None, resume: str | None) -> "RunPlace":
        """What ``--out`` and ``--resume`` mean together.

        ``latest`` continues the run at ``out``; a path continues that run, or the run from that checkpoint of its.
        """
        if resume is None or resume == LATEST:
            if out is None:
                raise UserError("Say with --out which folder the run is in.")
            return cls(out, resuming=resume is not None)
        path = Path(resume)
        if not path.is_dir():
            raise UserError(f"There is no run to resume in {path}.")
        checkpoint = Checkpoint.at(path) if path.name.startswith(PREFIX) else None
        run = path.parent if checkpoint else path
        if out is not None and out.resolve() != run.resolve():
            raise UserError(f"--resume {path} continues the run in {run}, but --out says {out}: omit --out.")
        return cls(run, resuming=True, checkpoint=checkpoint)

    @property
    def stored_config(self) -> Path | None:
        """The configuration file of the run to resume. UserError if there is no such run."""
        return _config_file(self.path) if self.resuming else None

    def check(self) -> None:
        """UserError where ``open`` would refuse to begin; worth asking before long preparations."""
        if not self.resuming and ControlPlane.current().is_main:
            RunFolder.check_free(self.path)

    def open(self, config: Config) -> RunFolder:
        """Begin or resume the run; see ``RunFolder``. Every rank calls it; the main one alone writes."""
        peers = ControlPlane.current()
        run = self._opened(config) if peers.is_main else None
        start = peers.broadcast_object(str(run.resume_from.path) if run and run.resume_from else None)
        return run or RunFolder(self.path, Checkpoint.at(Path(start)) if start else None)

    def _opened(self, config: Config) -> RunFolder:
        if self.resuming:
            return RunFolder.resume(self.path, config, self.checkpoint)
        return RunFolder.create(self.path, config)


def _config_file(run: Path) -> Path:
    if not (run / CONFIG).is_file():
        raise UserError(f"There is no run to resume in {run}.")
    return run / CONFIG
