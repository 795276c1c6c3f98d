"""Interface of a judge, and the candidates that it chooses among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

UNKNOWN = -1
"""Answer for an image that shows none of the candidates."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that an image may show, and that a model may be asked for.

    Attributes:
        label: Name in tables and files: a class name or a caption.
        text: Caption of it, for judges that read; the class name of a model without prompts.
        condition: The model's own condition, tensors [1, ...] by name; {} without.
    """

    label: str
    text: str
    condition: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


class Judge(Protocol):
    """Function from images to the candidates that they show.

    A judge must recognise the images of the original model, which are its control in every verdict.
    """

    @property
    def name(self) -> str:
        """Name in tables and files, such as "original" or "clip"."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Facts that a reader needs in order to repeat it (JSON): hashes of files, labels, thresholds."""

    @property
    def tells_apart(self) -> bool:
        """False for a detector of what is sought alone, which cannot say what retained images show."""

    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """Which of ``[*sought, *others]`` each image shows.

        Args:
            images: uint8 [N, 3, H, W] on the host.
            sought: Candidates that should be forgotten.
            others: Candidates beside them; at least one where ``tells_apart``.

        Returns:
            int64 [N] on the host: an index, or ``UNKNOWN``.

        Raises:
            UserError: The judge does not know a candidate, such as a classifier without such a label.
        """
