"""TopK sparse autoencoder, with products as sparse as its codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from erasediff_kernels import SparseCode, sparse_decode, topk_encode
from erasediff_kernels.ops.scatter_outer import group_by_latent


class SparseAutoencoder(nn.Module):
    """TopK sparse autoencoder of a block's activations (SAeUron, 2501.18052, eq. 1 and 2).

    z = TopK_k(ReLU(W_enc (x - b_dec) + b_enc)), x^ = z W_dec + b_dec. W_enc and W_dec are float32 [n, d]; W_dec begins
    as W_enc with rows of norm 1.

    Args:
        dim: d, the width of the block.
        latents: n, the number of latents; published as 16 d.
        k: Active latents per patch; published as 32.
        seed: Seed of the initial weights.

    Raises:
        ValueError: ``k`` outside 1 .. ``latents``.
    """

    def __init__(self, dim: int, latents: int, k: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= k <= latents:
            raise ValueError(f"k is {k}: it must lie in 1 .. {latents}, the number of latents")
        self.k = k
        generator = torch.Generator().manual_seed(seed)
        rows = nn.functional.normalize(torch.randn(latents, dim, generator=generator), dim=1)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(dim))

    @property
    def latents(self) -> int:
        return self.W_enc.shape[0]

    @torch.no_grad()
    def preactivations(self, x: Tensor) -> Tensor:
        """W_enc (x - b_dec) + b_enc, [N, n] for x [N, d]; ``encode`` is what carries gradients."""
        return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.T)

    def encode(self, x: Tensor, *, among: Tensor | None = None, k: int | None = None) -> SparseCode:
        """Sparse code of x [N, d]: the k largest activations per row, of the latents ``among`` bool [n] if given."""
        z = self.preactivations(x)
        if among is not None:
            z = z.masked_fill(~among, -torch.inf)
        return SparseCode(*_Encode.apply(x - self.b_dec, self.W_enc, self.b_enc, z, k or self.k))

    def decode(self, code: SparseCode) -> Tensor:
        """Reconstruction x^ [N, d] of a code."""
        return sparse_decode(code.values, code.indices, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale the rows of W_dec to norm 1."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the gradient of W_dec the part that would only change the norm of its rows."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)


class _Encode(torch.autograd.Function):
    """TopK of given preactivations; only the k latents of a row take part in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = topk_encode(z, k)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, weight, values, indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        active = grad * (values > 0)
        order, starts = group_by_latent(indices, weight.shape[0])
        scatter = torch.ops.erasediff.scatter_outer
        ones = active.new_ones(len(active), 1)
        grad_x = sparse_decode(active, indices, weight) if ctx.needs_input_grad[0] else None
        return grad_x, scatter(active, x, order, starts), scatter(active, ones, order, starts)[:, 0], None, None
