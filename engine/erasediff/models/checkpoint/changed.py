"""A checkpoint with changes to some of its weights, made as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from erasediff.io.tensor_file import StoredTensor
from erasediff.models.checkpoint.base import Checkpoint, canonical_name

Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""By a weight's canonical name, the function of its value; what that returns is rounded to the stored dtype."""


class ChangedCheckpoint:
    """Checkpoint as another, but for the weights that ``changes`` names; implements ``Checkpoint``.

    Args:
        source: The other.
        changes: By component.
    """

    def __init__(self, source: Checkpoint, changes: Mapping[str, Changes]) -> None:
        self._source = source
        self._changes = changes
        self.path: Path = source.path
        self.index: Mapping[str, Any] = source.index
        self.metadata: Mapping[str, str] = source.metadata
        self.original: Mapping[str, StoredTensor] = source.original

    def header(self, component: str) -> Mapping[str, str]:
        header = self._source.header(component)
        return {k: v for k, v in header.items() if component not in self._changes or "hash" not in k}

    def config(self, component: str) -> dict[str, Any]:
        return self._source.config(component)

    def tensors(self, component: str) -> Mapping[str, StoredTensor]:
        changes = self._changes.get(component, {})
        return {
            name: stored if (change := changes.get(canonical_name(name))) is None else stored.changed(change)
            for name, stored in self._source.tensors(component).items()
        }

    def tokenizer(self, component: str) -> Any:
        return self._source.tokenizer(component)

    def copy_small_files(self, folder: Path) -> None:
        self._source.copy_small_files(folder)

    def check_small_files(self) -> None:
        self._source.check_small_files()
