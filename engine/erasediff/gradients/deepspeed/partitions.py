"""What ZeRO 1 and 2 have in common with ZeRO 3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from erasediff.gradients.scatter import GradientScatter


def more_than_a_mean(optimizer: Any) -> dict[str, bool]:
    """What either of ZeRO's optimizers may have been told of its gradients."""
    return {
        "scaled": optimizer.postscale_gradients and optimizer.gradient_predivide_factor != 1.0,
        "in several precisions": len(optimizer.ipg_buckets) != 1,
        "of sequences in parts": optimizer.sequence_parallel_size != 1,
        "of tensors in parts": optimizer.autoep_folding_tp_group is not None,
    }


def zeros_on_the_host(like: Tensor, *, pinned: bool) -> Tensor:
    return torch.zeros_like(like, requires_grad=False, pin_memory=pinned and torch.cuda.is_available())


class OwnReduction:
    """``scatter`` in the place of the optimizer's own reduction, which copies each gradient two or three times more.

    add:   takes a parameter whose gradient is there, and what else DeepSpeed says of it
    names: of the optimizer's methods that do so
    """

    def __init__(self, optimizer: Any, scatter: GradientScatter, add: Callable[..., None], *names: str) -> None:
        self.optimizer = optimizer
        self.scatter = scatter
        self._instead: dict[str, Callable[..., None]] = dict.fromkeys(names, add)
        self._instead["independent_gradient_partition_epilogue"] = self._end_of_pass
        self._is_held = False

    def begin(self, flats: Sequence[Tensor]) -> None:
        self.scatter.begin(flats)
        vars(self.optimizer).update(self._instead)

    def finish(self) -> None:
        """The gradients are whole, or once they are no longer held. Whoever uses the engine then finds it as it was."""
        self.scatter.finish()
        if not self._is_held:
            self.scatter.wait()
        for name in self._instead:
            delattr(self.optimizer, name)

    def hold(self, held: bool) -> None:
        self._is_held = held
        if not held:
            self.scatter.wait()

    def _end_of_pass(self) -> None:
        self.optimizer._epilogue_ran_this_backward = True
