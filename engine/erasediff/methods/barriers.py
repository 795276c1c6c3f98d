"""Barriers: how much descent on the forget loss each step is held to.

The update is delta = r + lambda g with r = grad L_r, g = grad L_f and lambda = max(0, (a - <r,g>) / |g|^2), the vector
nearest to r with <delta,g> >= a (arXiv 2401.05779, Theorem 3.1; BOME, arXiv 2209.08709). A barrier is the choice of a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol


class Barrier(Protocol):
    """A name that ``erasediff_kernels.constraint_multiplier`` knows, with its one number."""

    name: ClassVar[str]
    needs_inner_solve: ClassVar[bool]

    @property
    def eta(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Norm:
    """a = eta |g|^2, hence lambda = max(0, eta - <r,g>/|g|^2) (2401.05779, a_t below Theorem 3.1).

    grad g = grad L_f whatever the inner solve finds, and a does not depend on it either: it is never run.
    """

    eta: float = 0.1
    name: ClassVar[str] = "norm"
    needs_inner_solve: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive("eta", self.eta)


@dataclass(frozen=True, slots=True)
class Gap:
    """a = eta max(L_f(theta) - L_f(phi_K), 0), phi_K from K steps on L_f: fades as the constraint is met (BOME)."""

    eta: float = 0.1
    name: ClassVar[str] = "gap"
    needs_inner_solve: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("eta", self.eta)


@dataclass(frozen=True, slots=True)
class Fixed:
    """lambda is a constant: a weighted sum of both losses, as in the published Stable Diffusion recipes (1.0)."""

    multiplier: float = 1.0
    name: ClassVar[str] = "fixed"
    needs_inner_solve: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.multiplier < 0:
            raise ValueError(
                f"multiplier must not be negative (it would ascend on the forget loss), got {self.multiplier}"
            )

    @property
    def eta(self) -> float:
        return self.multiplier


@dataclass(frozen=True, slots=True)
class Cosine:
    """lambda = max(0, eta - cos(r, g)): what the published code computes. Does not hold <delta,g> >= eta |g|^2."""

    eta: float = 0.1
    name: ClassVar[str] = "cosine"
    needs_inner_solve: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _positive("eta", self.eta)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
