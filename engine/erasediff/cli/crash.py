"""Last resort of the command line: an exception that nobody expected, in one sentence and a log of its traceback."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from erasediff.errors import UserError
from erasediff.io.cache_dir import cache_folder

CRASH_LOG = "crash.log"
SHOWN = 200
"""Characters of an exception's message that the sentence has."""

_run_folder: Path | None = None


def keep_crash_log_in(folder: Path | None) -> None:
    """Choose the folder of a run for the traceback of a crash, if it exists by then."""
    global _run_folder
    _run_folder = folder


def as_user_error(error: BaseException) -> UserError | None:
    """A mistake or a machine's limit behind an exception; None for a fault of the program."""
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in message:
        return UserError("There is not enough memory: choose smaller batches or images, or a smaller model.")
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return UserError(f"Cannot use {_shortened(str(error.filename))}: {os.strerror(error.errno).lower()}.")
    return None


def log_crash(error: BaseException, rank: int | None = None) -> str:
    """Write the traceback of ``error`` to the run's folder, or to the cache folder, and return a sentence that says so.

    Args:
        error: The exception.
        rank: The rank that raised it, among several.
    """
    name = CRASH_LOG if not rank else f"crash-rank-{rank}.log"
    folder = _run_folder if _run_folder is not None and _run_folder.is_dir() else cache_folder()
    text = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        where = f"the traceback is in {folder / name}"
    except OSError as refusal:
        where = f"its traceback could not be written ({refusal})"
    said = _shortened(f"{type(error).__name__}: {' '.join(str(error).split())}")
    return f"An unexpected error, which is a fault of erasediff and not yours ({said}); {where}, please report it."


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
