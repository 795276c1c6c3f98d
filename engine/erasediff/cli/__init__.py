"""The command line: thin commands over ``erasediff.workflows``.

Nothing here imports torch before a command needs it, so ``--help`` and a mistake in the flags answer at once.
"""

from erasediff.cli.main import main

__all__ = ["main"]
