"""Probe sampler: exact for a point, of any prediction type; noise and masks do what their equations say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from erasediff.diffusion.noise_schedule import Process
from erasediff.evaluation.probe_sampler import ExtraNoise, Known, clean_and_noise, ddim, spaced_timesteps

POINT = torch.tensor([[0.5, -0.25, 0.75]])
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def process_of(kind: str) -> Process:
    if kind == "flow_prediction":
        return Process.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    return Process.from_scheduler(DDIMScheduler(prediction_type=kind))


def exact(process: Process, point: Tensor) -> Callable[[int, Tensor, int], Tensor]:
    """The optimal prediction for a distribution that is one point."""

    def predict(step: int, sample: Tensor, timestep: int) -> Tensor:
        alpha, sigma = process.alpha[timestep], process.sigma[timestep]
        noise = (sample - alpha * point) / sigma
        return {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * point,
            "sample": point.expand_as(sample),
            "flow_prediction": noise - point,
        }[process.prediction_type]

    return predict


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_denoiser_of_a_point_leads_to_it(kind: str) -> None:
    process = process_of(kind)
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"extra": ExtraNoise(1.7, 1.04), "draw": lambda step: noise.roll(step, 0)}):
        drawn = ddim(process, noise, spaced_timesteps(process, 7), exact(process, POINT), **options)
        torch.testing.assert_close(drawn, POINT.expand(5, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_stands_for_the_image_and_the_noise(kind: str) -> None:
    process = process_of(kind)
    clean, noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    sample = process.alpha[300] * clean + process.sigma[300] * noise
    found = clean_and_noise(process, sample, exact(process, clean)(0, sample, 300), 300)
    torch.testing.assert_close(found, (clean, noise), atol=1e-4, rtol=1e-4)


def test_without_extra_noise_a_step_is_that_of_ddim() -> None:
    scheduler = DDIMScheduler(prediction_type="epsilon", clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    process = Process.from_scheduler(scheduler)
    sample = theirs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(0.3 * theirs, timestep, theirs).prev_sample
    timesteps = spaced_timesteps(process, 5)
    assert timesteps == scheduler.timesteps.tolist()
    ours = ddim(process, sample, timesteps, lambda step, noisy, timestep: 0.3 * noisy)
    # Theirs ends at the first timestep's noise level's clean image too, with alpha 1.
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_given_part_stays_and_the_start_is_late() -> None:
    process = process_of("epsilon")
    noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    mask, given = torch.tensor([[1.0, 0.0, 0.0]]), torch.full((1, 3), 0.9)
    timesteps, steps = spaced_timesteps(process, 6), []

    def predict(step: int, sample: Tensor, timestep: int) -> Tensor:
        steps.append(step)
        return exact(process, POINT)(step, sample, timestep)

    drawn = ddim(process, noise, timesteps, predict, first=3, known=Known(given, mask, noise))
    torch.testing.assert_close(drawn, torch.tensor([[0.5, 0.9, 0.9]]))
    assert steps == [3, 4, 5]
