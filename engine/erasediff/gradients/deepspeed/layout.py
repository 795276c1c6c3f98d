"""How an engine keeps what its optimizer updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Fragment(NamedTuple):
    """``length`` elements of ``parameter`` from ``start`` on, which lie in ``flats[flat]`` from ``offset`` on."""

    parameter: nn.Parameter
    start: int
    flat: int
    offset: int
    length: int


class Layout(Protocol):
    """How an engine of one stage keeps gradients and weights."""

    flats: list[Tensor]
    groups: list[int]
    """Which of the optimizer's groups each flat belongs to."""

    def renew(self) -> None:
        """Room for a new gradient, where ``take`` handed out what the engine had."""
        ...

    def take(self) -> list[Tensor]: ...

    def put(self, gradients: list[Tensor]) -> None:
        """What the engine's next step finds as its gradients."""
        ...

    def reuse(self, gradients: list[Tensor]) -> None:
        """Nobody needs what ``take`` has returned any more: the next gradient may be written there."""
        ...

    def hold(self, held: bool) -> None:
        """Whether weights that a pass has gathered stay for the next one, and what was taken may not be whole yet."""
        ...

    def fragments(self) -> Iterator[Fragment]: ...

    def refresh(self) -> None:
        """The model's weights from the flats."""
        ...
