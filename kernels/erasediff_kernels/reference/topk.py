"""Reference of `topk_encode`."""

import torch
from torch import Tensor


def topk_encode(preactivations: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # A stable sort leaves equal values in the order of their indices.
    values, indices = preactivations.relu().sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].to(torch.int32).contiguous()
