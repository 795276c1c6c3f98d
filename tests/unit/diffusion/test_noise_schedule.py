"""Schedules agree with diffusers, weights with their papers, and randomness with its address."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from erasediff import Process
from erasediff.diffusion import NoiseRole, draw_timesteps, noise_key
from erasediff_kernels import add_noise, philox_noise


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_noising_agrees_with_diffusers(scheduler_class, beta_schedule):
    scheduler = scheduler_class(num_train_timesteps=1000, beta_schedule=beta_schedule)
    process = Process.from_scheduler(scheduler)
    sample, noise = torch.randn(2, 16, 3, 4, 4)
    timesteps = torch.arange(0, 1000, 63)
    alpha, sigma = process.coefficients(timesteps)
    expected = DDPMScheduler.add_noise(scheduler, sample, noise, timesteps)
    torch.testing.assert_close(add_noise(sample, alpha, sigma, noise=noise), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_comes_from_the_scheduler(prediction_type):
    assert Process.from_scheduler(DDPMScheduler(prediction_type=prediction_type)).prediction_type == prediction_type


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_agrees_with_diffusers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = Process.from_scheduler(scheduler)
    assert process.prediction_type == "flow_prediction"
    torch.testing.assert_close(process.sigma.flip(0), scheduler.sigmas[:1000])
    torch.testing.assert_close(process.conditioning.flip(0), scheduler.timesteps, rtol=1e-5, atol=1e-3)
    sample, noise = torch.randn(2, 4, 3, 4, 4)
    timesteps = torch.tensor([0, 10, 500, 999])
    expected = scheduler.scale_noise(sample, process.conditioning[timesteps].clone(), noise) if shift == 1.0 else None
    alpha, sigma = process.coefficients(timesteps)
    if expected is not None:
        torch.testing.assert_close(add_noise(sample, alpha, sigma, noise=noise), expected, rtol=1e-4, atol=1e-4)


def test_scheduler_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match="neither alphas_cumprod"):
        Process.from_scheduler(object())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_min_snr_weights_are_the_bounded_weight_on_x0(prediction_type):
    """w |target - prediction|^2 equals min(SNR, gamma) |x_0 - predicted x_0|^2 whatever is predicted."""
    gamma = 5.0
    alphas_cumprod = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double()
    if prediction_type == "flow_prediction":
        process = Process.from_scheduler(FlowMatchEulerDiscreteScheduler())
        alpha, sigma = process.alpha.double()[:-1], process.sigma.double()[:-1]
    else:
        process = Process.from_scheduler(DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction_type))
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    # An error e in x_0 at a fixed x_t is an error of e times this in the prediction.
    error_scale = {
        "epsilon": alpha / sigma,
        "v_prediction": 1 / sigma,
        "sample": torch.ones_like(alpha),
        "flow_prediction": 1 / sigma,
    }[prediction_type]
    snr = (alpha / sigma).square()
    weight = process.min_snr_weight(torch.arange(alpha.numel()), gamma).double()
    torch.testing.assert_close(weight * error_scale.square(), snr.clamp(max=gamma), rtol=1e-4, atol=1e-6)


def test_min_snr_weight_is_finite_at_zero_terminal_snr():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    process = Process.from_scheduler(scheduler)
    assert process.min_snr_weight(torch.tensor([0, 999]), 5.0).isfinite().all()


def test_timesteps_are_uniform_and_depend_on_the_address_alone():
    ids = torch.arange(40_000)
    key = noise_key(5, 2, "cpu")
    timesteps = draw_timesteps(ids, key, NoiseRole.RETAIN_TIMESTEP, 100)
    counts = torch.bincount(timesteps, minlength=100)
    assert counts.numel() == 100
    chi_squared = ((counts - 400.0).square() / 400).sum()
    assert chi_squared < 160  # 99 degrees of freedom: exceeded with probability 1e-4
    assert torch.equal(draw_timesteps(ids[1000:1010], key, NoiseRole.RETAIN_TIMESTEP, 100), timesteps[1000:1010])
    for other in (noise_key(6, 2, "cpu"), noise_key(5, 3, "cpu")):
        assert not torch.equal(draw_timesteps(ids, other, NoiseRole.RETAIN_TIMESTEP, 100), timesteps)
    assert not torch.equal(draw_timesteps(ids, key, NoiseRole.FORGET_TIMESTEP, 100), timesteps)


def test_antithetic_timesteps_come_in_pairs_and_stay_uniform():
    timesteps = draw_timesteps(
        torch.arange(40_000), noise_key(0, 0, "cpu"), NoiseRole.RETAIN_TIMESTEP, 100, antithetic=True
    )
    even, odd = timesteps[::2], timesteps[1::2]
    assert torch.equal(even + odd, torch.full_like(even, 99))
    assert ((torch.bincount(even, minlength=100) - 200.0).square() / 200).sum() < 160


def test_noise_roles_are_distinct_streams():
    assert len(set(NoiseRole)) == len(NoiseRole.__members__)
    key = noise_key(1, 1, "cpu")
    drawn = [philox_noise(torch.arange(4), key, int(role), (8,)) for role in NoiseRole]
    for index, first in enumerate(drawn):
        for second in drawn[index + 1 :]:
            assert not torch.equal(first, second)
