"""Standard output and error that may be full, closed or in another encoding: what they refuse costs no run."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class LossyStream(io.TextIOBase):
    """Text stream that drops what its target refuses.

    Attributes:
        target: The stream that is written to.
        refusal: Why the target took no more: the first error; None while it takes everything.
    """

    def __init__(self, target: TextIO) -> None:
        self.target = target
        self.refusal: OSError | ValueError | None = None
        if isinstance(target, io.TextIOWrapper):
            # A path with é on an ASCII terminal.
            target.reconfigure(errors="backslashreplace")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.target.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.target.errors

    def isatty(self) -> bool:
        return self.refusal is None and self.target.isatty()

    def fileno(self) -> int:
        return self.target.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.refusal is None:
            try:
                self.target.write(text)
            except (OSError, ValueError) as error:
                self._refuse(error)
        return len(text)

    def flush(self) -> None:
        if self.refusal is None:
            try:
                self.target.flush()
            except (OSError, ValueError) as error:
                self._refuse(error)

    def _refuse(self, error: OSError | ValueError) -> None:
        self.refusal = error
        try:
            # What the target still holds would fail again when the interpreter ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.target.fileno())
            os.close(null)
        except (OSError, ValueError):
            return


@contextmanager
def lossy_streams() -> Iterator[LossyStream]:
    """Make standard output and error ``LossyStream``s within the block; yields standard output."""
    before = sys.stdout, sys.stderr
    output, errors = (LossyStream(_open(stream)) for stream in before)
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before


def _open(stream: TextIO | None) -> TextIO:
    """``stream``, or what drops everything in the place of one that was closed before the interpreter began."""
    return open(os.devnull, "w", encoding="utf-8") if stream is None else stream


def lost_results(output: LossyStream) -> str | None:
    """A sentence that says that results could not be printed; None if they were.

    A reader that has gone away, such as ``head``, has what it wanted.
    """
    output.flush()
    error = output.refusal
    if error is None or (isinstance(error, OSError) and error.errno == errno.EPIPE):
        return None
    reason = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)
    return f"The command has done its work, but its results could not be printed: {reason}."
