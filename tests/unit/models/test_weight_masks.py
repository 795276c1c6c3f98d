"""Files of masks: those of another form are refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erasediff.errors import UserError
from erasediff.models.weight_masks import load_masks


@pytest.mark.parametrize(
    "shapes",
    ["", "null", "[]", "{", '{"a": 8}', '{"a": [9]}', '{"a": [-8]}', '{"a": ["8"]}', '{"b": [8]}', '{"a": [NaN]}'],
)
def test_masks_of_another_form(shapes: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "x.safetensors", {"erasediff-mask-1": shapes})
    with pytest.raises(UserError, match=r"holds no masks|is damaged: its masks are not those that it describes"):
        load_masks(tmp_path / "x.safetensors")
