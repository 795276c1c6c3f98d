"""Reference of `sparse_decode` and of its gradients, `gather_dot`, `scatter_outer`."""

import torch
from torch import Tensor

from erasediff_kernels.reference.noise import widen


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z, rows = widen(values), widen(weight)
    decoded = z.new_zeros((values.shape[0], weight.shape[1])) if bias is None else widen(bias).repeat(len(values), 1)
    for column in range(values.shape[1]):
        decoded = decoded + z[:, column, None] * rows[indices[:, column].long()]
    return decoded.to(values.dtype)


def gather_dot(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    g, w = widen(rows), widen(weight)
    dots = [(g * w[indices[:, column].long()]).sum(dim=1) for column in range(indices.shape[1])]
    return torch.stack(dots, dim=1).to(rows.dtype) if dots else rows.new_empty(indices.shape)


def scatter_outer(values: Tensor, rows: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    latents = starts.numel() - 1
    z = widen(values).new_zeros((rows.shape[0], latents))
    counts = starts.diff()
    latent = torch.repeat_interleave(counts, output_size=order.numel())
    row = torch.div(order, max(1, values.shape[1]), rounding_mode="floor")
    z = z.index_put((row, latent), widen(values).reshape(-1)[order], accumulate=True)
    return (z.T @ widen(rows)).to(rows.dtype)
