"""ESD's target: the frozen model's prediction, guided away from the concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Convention = Literal["paper", "repository"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeGuidance:
    """base - eta (e_c - e_0), from the frozen model's predictions with the concept (e_c) and without (e_0).

    convention: "paper": base = e_0 (arXiv 2303.07345, eq. 7). "repository": base = e_c, as in the authors' newer code,
                where eta is larger by one for the same target: base - eta (e_c - e_0) = e_0 - (eta - 1) (e_c - e_0).
                With a prompt to erase from, its prediction is the base in both.

    Velocities and predictions of x_0 are affine in the score at a given x_t with coefficients that sum alike on both
    sides, so the same combination of them is the same combination of scores: it holds for every prediction type.
    """

    eta: float = 1.0
    convention: Convention = "paper"

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative (it would guide towards the concept), got {self.eta}")
        if self.convention not in ("paper", "repository"):
            raise ValueError(f"convention must be paper or repository, got {self.convention!r}")

    def target(self, concept: Tensor, null: Tensor, erase_from: Tensor | None = None) -> Tensor:
        """Like ``concept`` [B, ...]: e_c, e_0 and, perhaps, the prediction with the prompt to erase from."""
        if erase_from is None:
            erase_from = null if self.convention == "paper" else concept
        return erase_from - self.eta * (concept - null)
