"""Activations with planted concepts, and erasers of them and of the nano Stable Diffusion."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from erasediff.models.base import LatentModel
from erasediff.models.load import load_text_to_image
from erasediff.sae import (
    ActivationCache,
    ConceptEraser,
)

# Modules of this folder are found by their name.
sys.path.insert(0, str(Path(__file__).parent))

from planted import cache_of, eraser_of, trained


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Three concepts, each a direction of its own on top of eight that all share, at two timesteps."""
    folder = tmp_path_factory.mktemp("planted")
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    shards = []
    for number in range(3):
        concept = torch.tensor([0, 1, 2])
        weights = torch.rand(3, 2, 40, 8, generator=generator)
        x = (weights * (weights > 0.6)) @ directions[:8]
        x += 3 * directions[8 + concept][:, None, None]
        shards.append(folder / f"shard-{number}.safetensors")
        tensors = {"activations": x.half(), "concept": concept, "timestep": torch.tensor([900, 100])}
        save_file(tensors | {"map_size": torch.tensor([5, 8]), "drawn": concept.clone()}, shards[-1])
    return ActivationCache(tuple(shards))


@pytest.fixture(scope="module")
def planted_eraser(planted: ActivationCache) -> ConceptEraser:
    return eraser_of(trained(planted, 30), planted)


@pytest.fixture
def model(nano_folder: Callable[[str], Path]) -> LatentModel:
    return load_text_to_image(nano_folder("sd"))


@pytest.fixture
def eraser(model: LatentModel, tmp_path: Path) -> ConceptEraser:
    cache = cache_of(model, tmp_path / "cache")
    return eraser_of(trained(cache, 1), cache)
