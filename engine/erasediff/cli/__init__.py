"""The command line: a thin layer over ``erasediff.stages``.

Nothing here imports torch before a command needs it, so ``--help`` and a mistake in the flags answer at once.
"""

from erasediff.cli.main import main

__all__ = ["main"]
