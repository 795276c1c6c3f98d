"""How far two sets of images are from each other as distributions, from kernel values alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = Tensor | NDArray[np.float64]


def squared_discrepancy(xx: Matrix, yy: Matrix, xy: Matrix) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3).

    xx, yy, xy: the kernel's values [N, N], [M, M] and [N, M], N and M at least 2
    """
    return _mean_off_diagonal(xx) + _mean_off_diagonal(yy) - 2 * float(xy.mean())


def _mean_off_diagonal(kernel: Any) -> float:
    n = len(kernel)
    return float((kernel.sum() - kernel.trace()) / (n * (n - 1)))
