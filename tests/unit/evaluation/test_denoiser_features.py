"""Features of a frozen denoiser are those of its middle block, of any family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erasediff.evaluation.denoiser_features import DenoiserFeatures, middle_block
from erasediff.models.base import LatentModel
from erasediff.models.load import load_text_to_image, load_unprompted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["ddpm_unconditional", "ldm", "dit", "sd", "sd3", "flux"])
def test_each_family_has_features_that_depend_on_their_image_alone(
    nano_folder: Callable[[str], Path], name: str
) -> None:
    folder, device = nano_folder(name), torch.device("cpu")
    model = load_text_to_image(folder) if name in ("sd", "sd3", "flux") else load_unprompted(folder, device)
    condition = {}
    if isinstance(model, LatentModel):
        size = model.default_size
        condition = model.encode_prompts([""]) | model.size_condition(size, (0, 0), size, 1)
        shape = tuple(model.latent_shape(*size))
    else:
        shape = model.sample_shape
        if model.condition == "class":
            condition = {"class_labels": torch.tensor([0])}
    samples = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    features = DenoiserFeatures(model.denoiser, model.process, model.predict, condition, batch_size=2)
    found = features.of(samples)
    assert found.shape[0] == 3
    assert found.ndim == 2
    assert torch.isfinite(found).all()
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(features.of(samples.flip(0)).flip(0), found, rtol=1e-3, atol=1e-4)


def test_the_middle_block_is_that_of_the_network(nano_folder: Callable[[str], Path]) -> None:
    unet = load_unprompted(nano_folder("ddpm_unconditional"), torch.device("cpu")).denoiser
    assert middle_block(unet) is unet.mid_block
    transformer = load_unprompted(nano_folder("dit"), torch.device("cpu")).denoiser
    assert middle_block(transformer) is transformer.transformer_blocks[len(transformer.transformer_blocks) // 2]
    with pytest.raises(ValueError, match="neither a mid_block nor transformer_blocks"):
        middle_block(torch.nn.Linear(1, 1))
