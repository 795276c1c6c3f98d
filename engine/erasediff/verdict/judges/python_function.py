"""Judge that is a Python function of the user, "my_judge:shows"."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.verdict.judges.base import UNKNOWN, Candidate
from erasediff.verdict.judges.registry import JudgeKind
from erasediff.verdict.judges.transformers_folder import sha256


class FunctionJudge:
    """A function of images uint8 [N, 3, H, W] (NumPy) and the candidates' labels, a list of words.

    It returns N answers: indices into the labels, or labels; -1 or None for an image that shows none of them.

    Args:
        reference: Module and function, as in "my_judge:shows"; the module may lie in the current folder.

    Raises:
        UserError: The module cannot be imported, or has no such function.
    """

    tells_apart = True

    def __init__(self, reference: str) -> None:
        self.name = reference
        module, _, name = reference.partition(":")
        with current_folder_first():
            try:
                found: Any = import_module(module)
            except Exception as error:
                raise UserError(f"The judge {reference} cannot be imported: {_told(error)}.") from error
        file = getattr(found, "__file__", None)
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise UserError(f"{module} has no function {name}: define it, with images and labels as its arguments.")
        self.function: Callable[[Any, list[str]], Any] = found
        self._facts = {"function": reference, "sha256": {Path(file).name: sha256(Path(file))} if file else {}}

    @property
    def description(self) -> Mapping[str, Any]:
        return self._facts

    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """See ``Judge.answers``. UserError for a function that fails, and for answers that are none."""
        labels = [candidate.label for candidate in (*sought, *others)]
        try:
            found = self.function(images.numpy(), labels)
            answers = found.tolist() if isinstance(found, np.ndarray | Tensor) else list(found)
        except Exception as error:
            raise UserError(f"The judge {self.name} failed: {_told(error)}.") from error
        if len(answers) != len(images):
            raise UserError(f"The judge {self.name} gave {len(answers)} answers for {len(images)} images.")
        return torch.tensor([self._index(answer, labels) for answer in answers], dtype=torch.int64)

    def _index(self, answer: Any, labels: list[str]) -> int:
        if answer is None:
            return UNKNOWN
        if isinstance(answer, str) and answer in labels:
            return labels.index(answer)
        if isinstance(answer, int | np.integer) and not isinstance(answer, bool) and -1 <= answer < len(labels):
            return int(answer)
        raise UserError(
            f"The judge {self.name} answered {str(answer)[:60]!r}: return an index from 0 to {len(labels) - 1}, one of "
            "the labels, or -1 for none of them."
        )


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Find modules of the current folder within the block, as ``python -m`` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(".: ")


def _build(argument: str, device: torch.device) -> FunctionJudge:
    return FunctionJudge(argument)


KIND = JudgeKind("", "module:function", _build)
