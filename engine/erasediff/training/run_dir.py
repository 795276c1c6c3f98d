"""Run folders: configuration, metrics, checkpoints and the final model under one path."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erasediff.config import Config, differences, load_config, read_settings
from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write, remove_directory, remove_leftovers
from erasediff.io.disk_room import check_folder
from erasediff.io.jsonl import MetricsFile
from erasediff.io.temporary_names import is_temporary
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import PREFIX, Checkpoint

CONFIG = "config.yaml"
MODEL = "model"
SINGLE_FILE = "model.safetensors"
VERDICT = "verdict.json"
ROLLED_BACK = "rolled-back"
"""Folder of the model of a run that was stopped, from before it destroyed what it should keep."""
LATEST = "latest"
FREE = ("run.", "distributed.", "verdict.")
"""Sections that a resumed run may change, since they do not change results."""


class RunFolder:
    """Folder of a run: configuration, metrics, lists of images, ``checkpoint-N/``, and ``model/`` or a single file."""

    def __init__(self, path: Path, resume_from: Checkpoint | None = None) -> None:
        self.path = path
        self.resume_from = resume_from
        self.metrics = MetricsFile(path / "metrics.jsonl")
        self.model = path / MODEL

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Begin a run at ``path``.

        Raises:
            UserError: Something is there already.
        """
        cls.check_free(path)
        remove_leftovers(path)
        atomic_write(path / CONFIG, config.to_yaml())
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Check that ``path`` is empty, but for unfinished files of killed processes.

        Raises:
            UserError: The folder is not empty.
        """
        if path.exists() and (not path.is_dir() or any(not is_temporary(found.name) for found in path.iterdir())):
            raise UserError(f"{path} is not empty: choose another --out, or continue its run with --resume latest.")

    @classmethod
    def resume(cls, path: Path, config: Config, start: Checkpoint | None = None) -> "RunFolder":
        """Continue the run at ``path``.

        Args:
            path: Folder of the run.
            config: Its configuration, of which only the sections ``run`` and ``distributed`` may have changed, since a
                resumed run ends where the uninterrupted one would have.
            start: The checkpoint to continue from; None for the newest or, without any, the beginning.

        Raises:
            UserError: There is no run, or ``config`` changes its results.
        """
        differing = differences(cls.read_config(path), config)
        listed = read_settings(_config_file(path))
        changed = [name for name in differing if not name.startswith(FREE) and _is_listed(listed, name)]
        if changed:
            raise UserError(f"The run in {path} was started with another {' and '.join(changed)}: begin a new one.")
        remove_leftovers(path)
        atomic_write(path / CONFIG, config.to_yaml())
        start = start or Checkpoint.newest(path)
        run = cls(path, start)
        if run.finished and start is None:
            raise UserError(
                f"The run in {path} has finished and kept no checkpoint to resume from; use its model, or begin a new "
                "run with another --out."
            )
        return run

    @staticmethod
    def read_config(path: Path) -> Config:
        """Read the configuration of the run at ``path``.

        Raises:
            UserError: There is no run.
        """
        return load_config(_config_file(path))

    @property
    def begun(self) -> bool:
        """True if there is a run to resume."""
        return (self.path / CONFIG).is_file()

    @property
    def finished(self) -> bool:
        """True if the run's model has been saved; a verdict may have given it another name."""
        return self.model.is_dir() or any((self.path / name).is_file() for name in (SINGLE_FILE, VERDICT))

    def checkpoint(self, step: int) -> Checkpoint:
        """Checkpoint after ``step`` steps, which may not exist yet."""
        return Checkpoint(step, self.path / f"{PREFIX}{step}")

    def save_checkpoint(self, step: int, save: Callable[[Checkpoint], None], *, keep: int) -> None:
        """Write the checkpoint of ``step`` by ``save``, then remove the oldest beyond ``keep``."""
        save(self.checkpoint(step))
        self.remove_old_checkpoints(keep)

    def remove_old_checkpoints(self, keep: int) -> None:
        """Remove the oldest checkpoints beyond ``keep``, on the main rank."""
        if ControlPlane.current().is_main:
            for old in Checkpoint.of_run(self.path)[:-keep]:
                remove_directory(old.path)


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Path of a new run, or of the run to resume.

    Attributes:
        path: Folder of the run.
        resuming: Continue the run at ``path``.
        checkpoint: Checkpoint to continue from; None for the newest.
    """

    path: Path
    resuming: bool = False
    checkpoint: Checkpoint | None = None

    @classmethod
    def asked_for(cls, out: Path | None, resume: str | None) -> "RunPlace":
        """Resolve ``--out`` and ``--resume``.

        Args:
            out: The run's folder; None if ``resume`` names it.
            resume: None for a new run, "latest" to continue the run at ``out``, or the path of a run or a checkpoint.

        Raises:
            UserError: They name no run, none that exists, or two.
        """
        if resume is None or resume == LATEST:
            if out is None:
                raise UserError("There is no folder for the run; name one with --out.")
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
        """Configuration file of the run to resume; None for a new run.

        Raises:
            UserError: There is no such run.
        """
        return _config_file(self.path) if self.resuming else None

    def check(self) -> None:
        """Raise ``UserError`` for a folder that is not empty or not writable, before long preparations."""
        if not ControlPlane.current().is_main:
            return
        check_folder(self.path)
        if not self.resuming:
            RunFolder.check_free(self.path)

    def open(self, config: Config) -> RunFolder:
        """Begin or resume the run; see ``RunFolder``. Every rank calls it, and only the main one writes."""
        peers = ControlPlane.current()
        run = self._opened(config) if peers.is_main else None
        start = peers.broadcast_object(str(run.resume_from.path) if run and run.resume_from else None)
        return run or RunFolder(self.path, Checkpoint.at(Path(start)) if start else None)

    def _opened(self, config: Config) -> RunFolder:
        if self.resuming:
            return RunFolder.resume(self.path, config, self.checkpoint)
        return RunFolder.create(self.path, config)


def _is_listed(values: Any, name: str) -> bool:
    """Return true if a configuration file lists the setting ``name``: one that is younger than the run it does not."""
    for key in name.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _config_file(run: Path) -> Path:
    if not (run / CONFIG).is_file():
        raise UserError(f"There is no run to resume in {run}.")
    return run / CONFIG
