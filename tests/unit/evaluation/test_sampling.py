"""An image depends on the seed, its number and its class, and on nothing else."""

import pytest
import torch

from erasediff.diffusion.trajectories import Trajectories
from erasediff.errors import UserError
from erasediff.evaluation import sample_images
from erasediff.models import PixelModel


@pytest.fixture(scope="module")
def model() -> PixelModel:
    return PixelModel.build(num_classes=3, block_out_channels=(8, 16))


def test_an_image_depends_neither_on_the_batch_size_nor_on_the_others(model: PixelModel) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    whole = sample_images(model, labels, num_inference_steps=4)
    torch.testing.assert_close(sample_images(model, labels, num_inference_steps=4, batch_size=2), whole)
    torch.testing.assert_close(sample_images(model, labels[:3], num_inference_steps=4), whole[:3])
    assert not torch.allclose(sample_images(model, labels, num_inference_steps=4, seed=1), whole, atol=1e-2)
    assert whole.shape == (5, 1, 8, 8)
    assert whole.abs().max() <= 1


def test_scale_one_is_the_conditional_model_and_zero_the_null_label(model: PixelModel) -> None:
    labels, null = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    nearly = sample_images(model, labels, guidance_scale=1 + 1e-6, num_inference_steps=4)
    torch.testing.assert_close(sample_images(model, labels, guidance_scale=1.0, num_inference_steps=4), nearly)
    null_alone = sample_images(model, null, guidance_scale=1.0, num_inference_steps=4)
    torch.testing.assert_close(sample_images(model, labels, guidance_scale=0.0, num_inference_steps=4), null_alone)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_recovers_the_image_that_the_model_knows(prediction_type: str) -> None:
    """A model that always predicts one image, in whatever parametrisation, must be sampled to that image."""
    model = PixelModel.build(num_classes=None, block_out_channels=(8, 16), prediction_type=prediction_type)
    image = torch.linspace(-0.9, 0.9, 64).reshape(1, 1, 8, 8)
    alphas_cumprod = model.scheduler.alphas_cumprod

    def forward(sample: torch.Tensor, timesteps: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        timestep = timesteps[0]
        alpha, sigma = alphas_cumprod[timestep].sqrt(), (1 - alphas_cumprod[timestep]).sqrt()
        noise = (sample - alpha * image) / sigma
        predictions = {"epsilon": noise, "v_prediction": alpha * noise - sigma * image, "sample": image}
        return (predictions[prediction_type].expand_as(sample),)

    model.unet.forward = forward
    drawn = sample_images(model, None, 3, num_inference_steps=10)
    torch.testing.assert_close(drawn, image.expand(3, 1, 8, 8), atol=0.02, rtol=0)


def test_progress_adds_up_and_the_training_mode_comes_back(model: PixelModel) -> None:
    finished: list[int] = []
    model.unet.train()
    sample_images(
        model, torch.zeros(5, dtype=torch.int64), num_inference_steps=2, batch_size=2, progress=finished.append
    )
    assert finished == [2, 2, 1]
    assert model.unet.training


def test_labels_must_go_with_the_model_and_the_count(model: PixelModel) -> None:
    with pytest.raises(ValueError, match="needed by a conditional model"):
        sample_images(model, None, 3)
    with pytest.raises(ValueError, match="not 3"):
        sample_images(model, torch.zeros(2, dtype=torch.int64), 3)
    unconditional = PixelModel.build(num_classes=None, block_out_channels=(8, 16))
    with pytest.raises(ValueError, match="needs a count"):
        sample_images(unconditional, None)


def test_more_steps_than_timesteps_are_refused_by_every_sampler(model: PixelModel) -> None:
    steps = model.process.num_train_timesteps + 1
    with pytest.raises(UserError, match="A sampler of 1,001 steps takes more than the 1,000 timesteps"):
        sample_images(model, torch.tensor([0]), num_inference_steps=steps)
    with pytest.raises(UserError, match="choose fewer"):
        Trajectories(model.process, (1, 8, 8), torch.arange(2), total=2, steps=steps, seed=0)
    with pytest.raises(ValueError, match="at least one step"):
        Trajectories(model.process, (1, 8, 8), torch.arange(2), total=2, steps=0, seed=0)
