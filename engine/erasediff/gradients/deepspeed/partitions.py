"""What ZeRO 1 and 2 have in common with ZeRO 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
