"""Work that is killed, as functions of words: what no command does by itself."""

from __future__ import annotations

from pathlib import Path


def replace_folder(words: list[str]) -> None:
    from erasediff.io.atomic import atomic_directory

    with atomic_directory(Path(words[0]), replace=True) as folder:
        for name in ("a", "b"):
            (folder / "inner").mkdir(exist_ok=True)
            (folder / "inner" / name).write_text(f"new {name}")


def remove_folder(words: list[str]) -> None:
    from erasediff.io.atomic import remove_abandoned, remove_directory

    remove_abandoned(Path(words[0]).parent)
    remove_directory(Path(words[0]))


def replace_file(words: list[str]) -> None:
    from erasediff.io.atomic import atomic_write

    atomic_write(Path(words[0]), "new")


def nothing(_words: list[str]) -> None:
    """Where a kill came after the work."""


def obtain_model(words: list[str]) -> None:
    """A base model of the digits from the cache, trained if it is not there."""
    from rich.console import Console

    from erasediff.config import load_config
    from erasediff.workflows.train_pixel import CachedTraining

    CachedTraining(load_config(Path(words[0]))).obtain(Console(quiet=True), "Training")
