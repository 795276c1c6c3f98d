"""Trained models kept between runs, each under a hash of everything that went into it."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from erasediff.config import Config
from erasediff.data import load_digits
from erasediff.runs.atomic import storage_errors
from erasediff.runs.folder import RunFolder, RunPlace
from erasediff.stages.session import set_up_device
from erasediff.stages.training import train_base

ENVIRONMENT_VARIABLE = "ERASEDIFF_CACHE"
LIBRARIES = ("erasediff", "torch", "diffusers")


def cache_folder() -> Path:
    """``$ERASEDIFF_CACHE``, or ``erasediff`` in the user's cache."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "erasediff"


class CachedTraining:
    """The run that trains the model of ``config`` without the classes ``exclude``, in the cache."""

    def __init__(self, config: Config, exclude: tuple[int, ...] = ()) -> None:
        self.config = Config(
            seed=config.seed,
            device=set_up_device(config).type,
            threads=config.threads,
            precision=config.precision,
            model=config.model,
            data=config.data.model_copy(update={"exclude": tuple(sorted(exclude))}),
            train=config.train,
        )
        self.run = RunFolder(cache_folder() / f"model-{_fingerprint(self.config)}")

    def obtain(self, console: Console, title: str) -> RunFolder:
        """The finished run, carried out now unless it is there; a training that was cut short goes on."""
        with _lock(self.run.path, console):
            if not self.run.finished:
                train_base(self.config, RunPlace(self.run.path, resuming=self.run.begun), console, title)
        return self.run


def _fingerprint(config: Config) -> str:
    """Hash of the settings, the training images and the versions of the code that turns them into a model."""
    images = load_digits().train
    digest = hashlib.sha256(images.sample.numpy().tobytes() + images.class_labels.numpy().tobytes())
    digest.update(config.to_yaml().encode())
    digest.update(json.dumps({name: version(name) for name in LIBRARIES}).encode())
    return digest.hexdigest()[:16]


@contextmanager
def _lock(run: Path, console: Console) -> Iterator[None]:
    """Keep other processes from training the same model at the same time."""
    with storage_errors(run):
        run.parent.mkdir(parents=True, exist_ok=True)
        file = run.with_suffix(".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another process is training this model; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
