"""Units that FSDP2 gathers at once: blocks, not stages."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from erasediff.models.checkpoint.default_configs import KNOWN_CONFIGS
from erasediff.parallel.wrap import shard_units


def unit_sizes(network: nn.Module) -> list[int]:
    """Parameters of each unit that no unit within it has, the rest of the network last."""
    taken: set[nn.Parameter] = set()
    sizes = []
    for unit in (*shard_units(network), network):
        own = set(unit.parameters()) - taken
        taken |= own
        sizes.append(sum(parameter.numel() for parameter in own))
    assert taken == set(network.parameters())
    return sizes


@pytest.mark.parametrize(("family", "percent"), [("sdxl", 2.0), ("sd1", 6.0)])
def test_no_unit_of_a_unet_is_more_than_a_few_percent_of_it(family: str, percent: float) -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(KNOWN_CONFIGS[family]["unet"])
    sizes = unit_sizes(network)
    assert 100 * max(sizes) / sum(sizes) < percent
    assert min(sizes[:-1]) > 0


def test_a_network_without_named_blocks_is_gathered_by_its_stages() -> None:
    network = UNet2DModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2,
    )
    stages = {*network.down_blocks, network.mid_block, *network.up_blocks}
    assert stages <= set(shard_units(network))
