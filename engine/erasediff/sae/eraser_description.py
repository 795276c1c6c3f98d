"""Description of a saved concept eraser, ``concepts.json``, and its tensors, as they may be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from erasediff.io.json_file import read_object
from erasediff.io.tensor_file import TensorFile


class EraserDescription(BaseModel):
    """Content of ``concepts.json``; the attributes are those of ``ConceptEraser``, concepts by their names."""

    block: str
    k: PositiveInt
    concepts: list[str]
    erased: list[str]
    anchors: list[str]
    detection: Literal["published", "patch", "image"]
    intervention: Literal["published", "steer", "replace", "move"]
    strength: FiniteFloat
    distance: FiniteFloat

    @classmethod
    def read(cls, path: Path) -> EraserDescription:
        """Read the file at ``path``. ValueError that names a field which is missing or of another type."""
        try:
            return cls.model_validate(read_object(path), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Read all tensors of a file. ValueError for one that holds NaN; thresholds may be infinite."""
    tensors = {name: stored.load() for name, stored in TensorFile.open(path).tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ValueError(f"{name} holds NaN")
    return tensors
