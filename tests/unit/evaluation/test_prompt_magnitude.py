"""Magnitudes of conditional predictions, and their calibration by control prompts."""

import math
from pathlib import Path
from typing import Any

import nano
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from erasediff.errors import UserError
from erasediff.evaluation.control_captions import CONTROL_CAPTIONS
from erasediff.evaluation.prompt_magnitude import Calibration, PromptMagnitude, auc_above
from erasediff.models.base import LatentModel
from erasediff.models.load import load_text_to_image

GUIDED = ("sd", "sd_v_prediction", "sdxl", "sd3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentModel]:
    folder = tmp_path_factory.mktemp("models")
    return {name: load_text_to_image(nano.save(name, folder / name)) for name in (*GUIDED, "flux")}


def magnitude(model: LatentModel, **changes: Any) -> PromptMagnitude:
    settings: dict[str, Any] = {
        "draws": 2,
        "steps": 1,
        "num_inference_steps": 10,
        "guidance_scale": 7.5,
        "size": (32, 32),
        "seed": 3,
    }
    return PromptMagnitude(model=model, **settings | changes)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", GUIDED)
def test_the_empty_prompt_has_no_magnitude_and_others_have(
    name: str, steps: int, models: dict[str, LatentModel]
) -> None:
    empty, other = magnitude(models[name], steps=steps)(["", "a cat"])
    # Two rows of one batch may round differently.
    assert (empty < 1e-4 * other).all()
    assert (other > 0).all()


@pytest.mark.parametrize("name", GUIDED)
def test_a_prompt_has_the_same_magnitude_in_any_batch(name: str, models: dict[str, LatentModel]) -> None:
    measure = magnitude(models[name])
    together = measure(["a cat", "a dog"])
    assert together.shape == (2, 2)
    torch.testing.assert_close(together[1:], measure(["a dog"]))


def test_steps_are_those_of_diffusers_ddim(models: dict[str, LatentModel]) -> None:
    model = models["sd"]
    measured = magnitude(model, steps=4)(["a cat"])
    scheduler = DDIMScheduler.from_config(
        model.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(10)
    text, null = (model.encode_prompts([prompt])["encoder_hidden_states"] for prompt in ("a cat", ""))
    sample = _noise(model)
    total = torch.zeros(2)
    with torch.no_grad():
        for timestep in scheduler.timesteps[:4]:
            conditional, unconditional = (
                model.denoiser(sample, timestep, states.expand(2, -1, -1)).sample for states in (text, null)
            )
            total += (conditional - unconditional).flatten(1).norm(dim=1)
            guided = unconditional + 7.5 * (conditional - unconditional)
            sample = scheduler.step(guided, timestep, sample).prev_sample
    torch.testing.assert_close(measured[0], total / 4, rtol=1e-3, atol=1e-5)


def _noise(model: LatentModel) -> Tensor:
    """First noise of the images 0 and 1 of ``sample`` with the seed 3."""
    from erasediff.diffusion.rng import NoiseRole, noise_key
    from erasediff.models.pipeline import INITIAL_NOISE
    from erasediff_kernels import philox_noise

    key = noise_key(3, INITIAL_NOISE, "cpu")
    return philox_noise(torch.arange(2), key, int(NoiseRole.SAMPLING), model.latent_shape(32, 32))


def test_distilled_guidance_has_nothing_to_compare_with(models: dict[str, LatentModel]) -> None:
    with pytest.raises(UserError, match="no unconditional prediction"):
        magnitude(models["flux"])


def test_wrong_sizes_and_steps_are_refused(models: dict[str, LatentModel]) -> None:
    with pytest.raises(UserError):
        magnitude(models["sd"], size=(33, 32))
    with pytest.raises(UserError, match="timesteps"):
        magnitude(models["sd"], num_inference_steps=2000)
    for wrong in ({"steps": 11}, {"steps": 0}, {"draws": 0}):
        with pytest.raises(ValueError, match="draws"):
            magnitude(models["sd"], **wrong)


def test_the_threshold_is_exceeded_by_one_in_a_hundred() -> None:
    scores = [float(number) for number in range(200)]
    calibration = Calibration.of(scores)
    assert sum(score > calibration.threshold for score in scores) == 2
    assert calibration.mean == 99.5
    assert calibration.deviation == pytest.approx(torch.tensor(scores).std().item())
    assert calibration.z(99.5 + 2 * calibration.deviation) == pytest.approx(2)
    few = Calibration.of([1.0, 3.0, 2.0])
    assert few.threshold == 3.0
    assert math.isnan(Calibration.of([1.0, 1.0]).z(2.0))
    with pytest.raises(ValueError, match="at least two"):
        Calibration.of([1.0])


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert auc_above([2.0, 4.0], [1.0, 3.0]) == 0.75
    assert auc_above([1.0], [1.0]) == 0.5


def test_control_captions_differ() -> None:
    assert len(set(CONTROL_CAPTIONS)) == len(CONTROL_CAPTIONS) == 50


def test_a_size_condition_is_given(tmp_path: Path, models: dict[str, LatentModel]) -> None:
    """SDXL is told the size that is drawn."""
    small, large = (magnitude(models["sdxl"], size=size)(["a cat"]) for size in ((32, 32), (64, 64)))
    assert not torch.allclose(small, large)
