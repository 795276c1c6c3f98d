"""A text-to-image denoiser with random weights, and batches of latents with encoded prompts. Put yours in its place."""

from collections.abc import Iterator

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
BATCH_SIZE = 6


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=32,
    )


def batches(count: int, *, stream: int, rank: int = 0, size: int = 1) -> Iterator[dict[str, Tensor]]:
    """Process ``rank``'s part of ``count`` global batches; the keys but "sample" are keywords of the UNet's forward."""
    for step in range(count):
        generator = torch.Generator().manual_seed(1000 * step + stream)
        whole = {
            "sample": torch.randn(BATCH_SIZE, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(BATCH_SIZE, 3, 32, generator=generator),
            "sample_ids": torch.arange(BATCH_SIZE),
        }
        yield {name: value.chunk(size)[rank] for name, value in whole.items()}
