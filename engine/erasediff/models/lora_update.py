"""Changes of a layer by a LoRA file: low-rank, Hadamard and Kronecker products, and plain differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from peft.tuners.loha.layer import make_weight, make_weight_cp
from peft.tuners.lokr.layer import make_kron
from peft.tuners.lokr.layer import make_weight_cp as make_tucker
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a change for several layers at once, such as queries, keys and values, that are one layer's own.

    Attributes:
        begin: The first row.
        end: The row after the last.
        swapped: Whether the layer has the two halves of them in the other order.
    """

    begin: int
    end: int
    swapped: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        rows = tensor[self.begin : self.end]
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows


@dataclass(frozen=True, slots=True)
class Adapter:
    """One layer's adapter: weight + alpha / rank up down, or with ``magnitude`` DoRA's, rescaled row by row.

    Source: LoRA (Hu et al. 2021, eq. 3), rsLoRA (Kalajdzievski 2023: alpha / sqrt(rank), here within ``alpha``), DoRA
    (Liu et al. 2024, eq. 5).

    Attributes:
        down: [rank, in, ...].
        up: [out, rank, ...].
        alpha: The scale times the rank.
        bias: [out], of ``up``: the layer's bias gets it times the scale. None for none.
        magnitude: [out], the norm of each row of the merged weight. None for plain LoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def outputs(self) -> int:
        return self.up.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def rows(self, rows: Rows) -> Adapter:
        """The adapter of one of the layers that this one is for."""
        bias, magnitude = (None if part is None else rows.of(part) for part in (self.bias, self.magnitude))
        return replace(self, up=rows.of(self.up), bias=bias, magnitude=magnitude)

    def change(self) -> Change:
        """The same as a sum; it cannot be trained."""
        return Change(
            lambda: (self.up.float().flatten(1) @ self.down.float().flatten(1)) * self.scale,
            size=(self.up.shape[0], self.up.shape[0] * prod(self.down.shape[1:])),
            bias=None if self.bias is None else self.bias.float() * self.scale,
            magnitude=self.magnitude,
        )


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a layer's weight and bias.

    Attributes:
        weight: Makes what is added to the weight, its first dimension the outputs, in any shape; None for nothing.
        size: Of ``weight``: (outputs, elements).
        bias: [out]; None for nothing.
        magnitude: [out], to which the rows of the changed weight are rescaled, as DoRA's. None to leave them.
    """

    weight: Callable[[], Tensor] | None = None
    size: tuple[int, int] = (0, 0)
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.size[0] if self.bias is None else self.bias.shape[0]

    def rows(self, rows: Rows) -> Change:
        """The change of one of the layers that this one is for."""
        bias, magnitude = (None if part is None else rows.of(part) for part in (self.bias, self.magnitude))
        outputs, elements = self.size
        if self.weight is None:
            return Change(bias=bias)
        weight = self.weight
        count = rows.end - rows.begin
        return Change(lambda: rows.of(weight()), (count, elements // outputs * count), bias, magnitude)

    def applied(self, weight: Tensor) -> Tensor:
        """The changed weight, float32."""
        changed = weight.float()
        if self.weight is not None:
            changed = changed + self.weight().float().reshape(weight.shape).to(weight.device)
        if self.magnitude is not None:
            norm = changed.flatten(1).norm(dim=1)
            ratio = self.magnitude.float().to(weight.device) / norm
            changed = changed * ratio.reshape(-1, *[1] * (changed.ndim - 1))
        return changed


def hadamard(factors: Mapping[str, Tensor], scale: float) -> Tensor:
    """LoHa's change: the elementwise product of two low-rank ones (Hyeon-Woo et al. 2022, FedPara, proposition 1).

    Args:
        factors: "w1_a" [out, rank], "w1_b" [rank, in], and the same of w2; with "t1" and "t2", [rank, rank, k, k], the
            Tucker form of a convolution, in which "w1_a" is [rank, out].
        scale: Multiplies the product.
    """
    parts = {name: factor.float() for name, factor in factors.items()}
    first, second = ([parts[f"{name}_a"], parts[f"{name}_b"]] for name in ("w1", "w2"))
    factor = torch.tensor(scale)
    if "t1" in parts or "t2" in parts:
        product: Tensor = make_weight_cp(parts["t1"], *first, parts["t2"], *second, factor)
    else:
        product = make_weight(*first, *second, factor)
    return product


def kronecker(factors: Mapping[str, Tensor], scale: float) -> Tensor:
    """LoKr's change: the Kronecker product of w1 and w2 (Yeh et al. 2024, LyCORIS, section 3.2).

    Args:
        factors: "w1" or its factors "w1_a" and "w1_b"; "w2" or its own, with "t2" in the Tucker form of a convolution.
        scale: Multiplies the product.
    """
    parts = {name: factor.float() for name, factor in factors.items()}

    def whole(name: str) -> Tensor:
        if name in parts:
            return parts[name]
        halves = parts[f"{name}_a"], parts[f"{name}_b"]
        product: Tensor = make_tucker(parts["t2"], *halves) if name == "w2" and "t2" in parts else halves[0] @ halves[1]
        return product

    product: Tensor = make_kron(whole("w1"), whole("w2"), scale)
    return product
