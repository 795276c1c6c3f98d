"""Signals that ask a run to stop."""

import signal


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and the SIGHUP of a lost terminal, but for those that this process was told to ignore.

    SIGHUP is ignored under nohup.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
