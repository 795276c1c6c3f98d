"""Signals that ask a run to stop."""

import signal


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and the SIGHUP of a lost terminal, unless this process was told to ignore that, as by nohup.

    A shell's background job ignores Ctrl-C of the terminal, but one who sends it SIGINT by number means it.
    """
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]
