"""A model small enough to check by hand, and batches for it."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from erasediff import Process

NUM_CLASSES = 5


class TinyDenoiser(nn.Module):
    """A class-conditional MLP with the call of diffusers' UNet2DModel, on [B, 1, 2, 3] samples."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(NUM_CLASSES + 1, 8)
        self.inward = nn.Linear(6 + 1 + 8, 16)
        self.outward = nn.Linear(16, 6)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        time = timestep.to(sample.dtype)[:, None] / 100
        hidden = torch.cat([sample.flatten(1), time, self.label(class_labels)], dim=1)
        return (self.outward(torch.tanh(self.inward(hidden))).reshape(sample.shape),)


@pytest.fixture
def make_model() -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return TinyDenoiser()

    return make


@pytest.fixture
def model(make_model: Callable[[], nn.Module]) -> nn.Module:
    return make_model()


@pytest.fixture
def process() -> Process:
    return Process.from_scheduler(DDPMScheduler(num_train_timesteps=100))


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    def make(label: int, size: int = 8, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "sample": torch.randn(size, 1, 2, 3, generator=generator),
            "class_labels": torch.full((size,), label),
            "sample_ids": torch.arange(size),
        }

    return make
