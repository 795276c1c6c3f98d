"""The command line: thin commands over ``erasediff.workflows``.

Nothing here imports torch before a command needs it, so ``--help`` and a mistake in the flags answer at once.
"""

from erasediff.cli.interrupts import exit_on_interrupt

with exit_on_interrupt():
    from erasediff.cli.main import main

__all__ = ["main"]
