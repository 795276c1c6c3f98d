"""Distances between distributions of image features: Fréchet, kernel (MMD), Gaussian MMD."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = Tensor | NDArray[np.float64]


def squared_discrepancy(xx: Matrix, yy: Matrix, xy: Matrix) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3).

    Args:
        xx, yy, xy: The kernel's values [N, N], [M, M] and [N, M], N and M at least 2.
    """
    return _mean_off_diagonal(xx) + _mean_off_diagonal(yy) - 2 * float(xy.mean())


def _mean_off_diagonal(kernel: Any) -> float:
    n = len(kernel)
    return float((kernel.sum() - kernel.trace()) / (n * (n - 1)))


def frechet_distance(features: Tensor, real: Tensor) -> float:
    """Fréchet distance |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of [N, D] and [M, D] (Heusel et al. 2017).

    FID's formula, in fp64, of features of the task's classifier instead of Inception's: the numbers of two tasks cannot
    be compared.
    """
    (m, c), (n, d) = ((x.double().mean(0), x.double().T.cov()) for x in (features, real))
    root = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + c.trace() + d.trace() - 2 * root)


def kernel_distance(features: Tensor, real: Tensor) -> float:
    """Unbiased squared MMD of [N, D] and [M, D] in the kernel (x.y / D + 1)^3 (Binkowski et al. 2018; KID's).

    Over all images, where KID averages over blocks of 1,000. It may be a little below zero.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    x, y = features.double(), real.double()
    return squared_discrepancy(kernel(x, x), kernel(y, y), kernel(x, y))


def gaussian_distance(features: Tensor, reference: Tensor) -> float:
    """Unbiased squared MMD of [N, D] and [M, D] in a Gaussian kernel (Gretton et al. 2012, eq. 3), 2 at the most.

    Its squared width is the median squared distance within ``reference``. It may be a little below zero.
    """
    x, y = features.double(), reference.double()
    width = torch.pdist(y).square().median()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b).square() / (2 * width)).exp()

    return squared_discrepancy(kernel(x, x), kernel(y, y), kernel(x, y))
