"""Every scheduler of diffusers: its process noises as the scheduler itself does, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import DummyObject
from torch import Tensor

from erasediff import Process

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CLASSES = {
    name: cls
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and inspect.isclass(cls := getattr(diffusers.schedulers, name))
}
REFUSED = {
    *("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
    *("VQDiffusionScheduler", "RFD4ProteinaScheduler"),
    *("CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "CosineDPMSolverMultistepScheduler"),
    *("DDPMWuerstchenScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "IPNDMScheduler"),
    *("KarrasVeScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler"),
    *(
        "FlowMapEulerDiscreteScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
        "LTXEulerAncestralRFScheduler",
        "MiniMaxH3Scheduler",
    ),
    "PiflowScheduler",
}
"""Schedulers of discrete, variance-exploding, consistency and flow-map models, or with other conventions of time."""
MULTISTEP = {
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    "UniPCMultistepScheduler",
}
"""Until they are told the number of steps, their sigmas ascend while their timesteps descend."""
REQUIRED = {
    "AmusedScheduler": {"mask_token_id": 5},
    "VQDiffusionScheduler": {"num_vec_classes": 5},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
FLOW = [
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
]
DIFFUSION = {"epsilon", "v_prediction", "sample"}


def made(name: str, **options: Any) -> Any:
    cls = CLASSES[name]
    try:
        return cls(**REQUIRED.get(name, {}), **options)
    except ImportError as error:
        pytest.skip(" ".join(str(error).split())[:80])


def noising(scheduler: Any) -> Callable[..., Tensor] | None:
    for name in ("add_noise", "scale_noise"):
        if hasattr(scheduler, name):
            method: Callable[..., Tensor] = getattr(scheduler, name)
            return method
    return None


def own_coefficients(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """(signal, noise) of the scheduler's own noising at one of its timesteps, in float64, as the network sees them."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    times = timestep[None]
    if hasattr(scheduler, "add_noise"):
        noisy = [scheduler.add_noise(*pair, times) for pair in ((one, zero), (zero, one))]
    else:
        noisy = [scheduler.scale_noise(sample, times, noise) for sample, noise in ((one, zero), (zero, one))]
    signal, noise = (float(value) for value in noisy)
    # Euler's and others' samples are x_0 + sigma eps; the network is given them divided by sqrt(1 + sigma^2).
    scale = (1 + noise**2) ** 0.5 if signal == 1.0 and noise > 1e-12 else 1.0
    return signal / scale, noise / scale


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_process_noises_as_the_scheduler_does(name: str) -> None:
    if isinstance(CLASSES[name], DummyObject):
        pytest.skip("needs a library that is not installed")
    scheduler = made(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{name} has neither alphas_cumprod nor flow-matching sigmas"):
            Process.from_scheduler(scheduler)
        return
    process = Process.from_scheduler(scheduler)
    if noising(scheduler) is None or name == "RePaintScheduler":  # RePaint's own add_noise only raises
        check_tables(scheduler, process)
        return
    steps = scheduler.config.num_train_timesteps
    if name in MULTISTEP:
        scheduler.set_timesteps(steps)
    for index in (1, steps // 3, steps // 2, steps - 1):
        timestep = process.conditioning[index]
        if process.conditioning.is_floating_point():
            timestep = scheduler.timesteps[(scheduler.timesteps - timestep).abs().argmin()]
        if hasattr(scheduler, "_init_step_index"):
            scheduler._step_index = None
        signal, noise = own_coefficients(scheduler, timestep)
        assert float(process.alpha[index]) == pytest.approx(signal, abs=2e-6)
        assert float(process.sigma[index]) == pytest.approx(noise, abs=2e-6)


def check_tables(scheduler: Any, process: Process) -> None:
    if process.prediction_type == "flow_prediction":
        torch.testing.assert_close(process.sigma.flip(0).double(), scheduler.sigmas.double(), rtol=0, atol=2e-6)
        torch.testing.assert_close(process.alpha + process.sigma, torch.ones_like(process.alpha))
    else:
        torch.testing.assert_close(
            process.alpha.square().double(), scheduler.alphas_cumprod.double(), rtol=0, atol=2e-6
        )
        torch.testing.assert_close(process.alpha.square() + process.sigma.square(), torch.ones_like(process.alpha))


@pytest.mark.parametrize("cls", FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_of_a_scheduler_with_a_ddpm_table(cls: Any, shift: float) -> None:
    """Compared where the sampler steps: sigma as it is at each of the sampler's own times."""
    scheduler = cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    process = Process.from_scheduler(scheduler)
    assert process.prediction_type == "flow_prediction"
    torch.testing.assert_close(process.alpha + process.sigma, torch.ones_like(process.alpha))
    euler = Process.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))
    assert torch.equal(process.sigma, euler.sigma)
    assert torch.equal(process.conditioning, euler.conditioning)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)].double()
    # x_t = alpha x_0 + sigma eps is what the solver's conversion of a flow prediction to x_0 assumes.
    for sigma in sigmas[:: len(sigmas) // 4]:
        alpha, own = scheduler._sigma_to_alpha_sigma_t(sigma)
        nearest = (process.sigma - sigma).abs().argmin()
        assert float(process.sigma[nearest]) == pytest.approx(float(own), abs=2e-3)
        assert float(process.alpha[nearest]) == pytest.approx(float(alpha), abs=2e-3)
        # Solvers round the time that they tell the network down to an integer.
        assert float(process.conditioning[nearest]) == pytest.approx(float(sigma) * 1000, abs=2)


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_dynamic_shifting_is_the_samplers_alone(cls: Any) -> None:
    flow = {} if cls is FlowMatchEulerDiscreteScheduler else {"use_flow_sigmas": True, "flow_shift": 3.0}
    predicts = {"prediction_type": "flow_prediction"} if flow else {"shift": 3.0}
    scheduler = cls(use_dynamic_shifting=True, **flow, **predicts)
    process = Process.from_scheduler(scheduler)
    torch.testing.assert_close(process.sigma, torch.arange(1, 1001) / 1000)
    scheduler.set_timesteps(10, mu=1.15)
    assert torch.equal(Process.from_scheduler(scheduler).sigma, process.sigma)


def test_sampling_does_not_change_the_process() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = Process.from_scheduler(scheduler)
    scheduler.set_timesteps(7)
    assert torch.equal(Process.from_scheduler(scheduler).sigma, before.sigma)
    scheduler.set_shift(1.0)
    assert torch.equal(Process.from_scheduler(scheduler).sigma, torch.arange(1, 1001).double().div(1000).float())


@pytest.mark.parametrize("cls", [*FLOW, DDPMScheduler])
def test_both_kinds_at_once_are_a_contradiction(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"contradicts itself.*'flow_prediction'.*use_flow_sigmas is (False|None)"):
        Process.from_scheduler(cls(prediction_type="flow_prediction"))
    if cls is not DDPMScheduler:
        for prediction_type in DIFFUSION:
            with pytest.raises(ValueError, match=f"contradicts itself.*'{prediction_type}'.*use_flow_sigmas is True"):
                Process.from_scheduler(cls(prediction_type=prediction_type, use_flow_sigmas=True))


def test_inverted_sigmas_are_refused() -> None:
    with pytest.raises(ValueError, match="invert_sigmas"):
        Process.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
