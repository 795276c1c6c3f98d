"""A LoRA file merged into a nano model, and layers of nano SD for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from erasediff.models import lora
from erasediff.models.load import load_text_to_image

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY = f"{BLOCK}.attn2.to_q"
"""[16, 16] in nano SD."""
CONV = "down_blocks.0.resnets.0.conv1"
"""[16, 16, 3, 3]."""
POINT = "down_blocks.0.attentions.0.proj_in"
"""[16, 16, 1, 1]."""


def low_rank(rows: int, columns: int, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


class Merged:
    """A model before and after a LoRA file was merged."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], path: Path, metadata: Any = None) -> None:
        save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, metadata)
        self.model: Any = load_text_to_image(folder)
        self.before = {name: value.clone() for name, value in self.model.denoiser.state_dict().items()}
        self.hash = self.model.hash
        lora.merge_file(self.model, path)
        self.after = self.model.denoiser.state_dict()

    def assert_changed(self, expected: dict[str, Tensor]) -> None:
        """The weights are ``expected``, and all others as before."""
        assert self.after.keys() == self.before.keys()
        for name, value in self.after.items():
            if name in expected:
                assert not torch.equal(value, self.before[name])
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(value, self.before[name]), name
