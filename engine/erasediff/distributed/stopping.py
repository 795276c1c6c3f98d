"""All ranks stop after the same step, though a signal reaches them at different ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from erasediff.distributed.world import World


class AgreedStop:
    """The signal that any rank was sent, as all ranks see it after the same step.

    The ranks' answers are reduced on the host while the next step runs, so nothing waits for the device; a stop comes
    one step after the signal.
    """

    def __init__(self, signal_number: Callable[[], int | None]) -> None:
        self._signal_number = signal_number
        self._is_alone = World.current().size == 1
        self._pending: tuple[Tensor, dist.Work] | None = None

    def after_step(self) -> int | None:
        """The signal to stop for, or None. A collective."""
        if self._is_alone:
            return self._signal_number()
        agreed = self._finished()
        asked = torch.tensor(self._signal_number() or 0)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = asked, work
        return agreed

    def close(self) -> None:
        """Take part in what is still under way."""
        self._finished()

    def _finished(self) -> int | None:
        if self._pending is None:
            return None
        asked, work = self._pending
        self._pending = None
        work.wait()
        return int(asked) or None
