"""Lists of parameter shapes that the step is measured on."""

import torch


def sd15() -> list[tuple[int, ...]]:
    """The UNet of Stable Diffusion 1.5 with its two outer resolutions only: about 120 M parameters in 360 tensors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(
            block_out_channels=(320, 640),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=(2, 1),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    return [tuple(p.shape) for p in model.parameters()]


def sd15_whole() -> list[tuple[int, ...]]:
    """The UNet of Stable Diffusion 1.5: 860 M parameters in 686 tensors. Its step needs 17 GB in fp32."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768)
    return [tuple(p.shape) for p in model.parameters()]


def equal() -> list[tuple[int, ...]]:
    """60 equal tensors of 2.1 M elements."""
    return [(2**21,)] * 60


def small() -> list[tuple[int, ...]]:
    """1,000 tensors of 1,000 elements."""
    return [(1000,)] * 1000


SHAPES = {"sd15": sd15, "sd15_whole": sd15_whole, "equal": equal, "small": small}
