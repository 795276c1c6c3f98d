"""Exceptions that end a command without a traceback. No heavy imports: the command line needs them for ``--help``."""

from pathlib import Path
from typing import ClassVar


class UserError(Exception):
    """Invalid user input; the message is one sentence that says what is wrong and how to fix it.

    The command line prints the sentence without a traceback and exits with code 2. Code that finds a programming
    error raises ``ValueError`` or ``TypeError`` instead.
    """

    exit_code: ClassVar[int] = 2


class RunFailedError(Exception):
    """A run without a result: it diverged, collapsed or changed no weight. No ``model/`` is written.

    The message is one sentence as ``UserError``'s; the command line exits with code 3. Checkpoints stay for diagnosis.
    """

    exit_code: ClassVar[int] = 3


class Interrupted(Exception):
    """A run that a signal has stopped; ``checkpoint`` holds all of its state."""

    def __init__(self, signal_number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped after step {step}; saved {checkpoint}")
        self.exit_code = 128 + signal_number
        self.step = step
        self.checkpoint = checkpoint


def reason(error: BaseException) -> str:
    """The message of a library's ``error`` as a part of a sentence: in one line, without a full stop at its end."""
    return " ".join(str(error).split()).rstrip(".")
