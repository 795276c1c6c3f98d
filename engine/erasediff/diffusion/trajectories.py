"""Pools of sampling trajectories, advanced together, each at its own timestep: latents of a concept without images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff_kernels import philox_noise


class Trajectories:
    """A pool of B deterministic sampling trajectories, one step apart from where they were at the iteration before.

    Trajectory b is at step (k_b + iteration) mod S of S, its offsets k_b spread evenly over [0, S), so that every batch
    covers all of time; one that has arrived begins again from new noise. A training step therefore costs one step of
    sampling, where a trajectory of its own for each sample would cost S/2. What is gained is paid for in correlation:
    a trajectory lends its states to consecutive iterations.

    The sampler is DDIM's at eta 0 (Song et al. 2021, eq. 12) with trailing timesteps, which for flow matching is
    Euler's: both keep the estimates of x_0 and eps and change their coefficients.

    Args:
        process: noise schedule and prediction type of the sampling model.
        shape: (C, h, w) of a sample.
        slots: int64 [B], the places of this process's trajectories in the global pool; the noise is addressed by
            (seed, how often the place began anew, place).
        total: places in the global pool.
        steps: S.
        seed: of the noise.

    Raises:
        ValueError: for less than one step.
        UserError: for more steps than the process has timesteps.
    """

    def __init__(
        self, process: Process, shape: tuple[int, ...], slots: Tensor, *, total: int, steps: int, seed: int
    ) -> None:
        if steps < 1:
            raise ValueError(f"a trajectory has at least one step, not {steps}")
        process.check_inference_steps(steps)
        self.process = process
        self.shape = shape
        self.slots = slots
        self.total = total
        self.steps = steps
        self.key = noise_key(seed, 0, slots.device)
        step = torch.arange(steps, device=slots.device)
        self.timesteps = process.num_train_timesteps - 1 - step * process.num_train_timesteps // steps
        self.offsets = slots * steps // total
        self.sample = torch.zeros(len(slots), *shape, device=slots.device)
        """States x_t [B, C, h, w] at ``iteration``."""
        self.iteration: int | None = None
        """The iteration that ``sample`` belongs to; None before the pool was sampled."""

    def state_dict(self) -> dict[str, Tensor | None]:
        """The states, None before the pool was sampled."""
        return {"trajectories": None if self.iteration is None else self.sample}

    def load_state_dict(self, state: Mapping[str, Tensor | None], iteration: int) -> None:
        """Restore ``state_dict`` of a pool at ``iteration``."""
        sample = state["trajectories"]
        self.iteration = None if sample is None else iteration
        if sample is not None:
            self.sample = sample.to(self.slots.device)

    def places(self, iteration: int) -> tuple[Tensor, Tensor]:
        """(which trajectory, step within it), each int64 [B]. Trajectories count up in every slot."""
        age = self.offsets + iteration
        return self.slots + self.total * (age // self.steps), age % self.steps

    def times(self, iteration: int) -> Tensor:
        """The train timestep of each trajectory's state, int64 [B]."""
        return self.timesteps[self.places(iteration)[1]]

    def noise(self, iteration: int) -> Tensor:
        """The first state of each slot's trajectory of ``iteration`` begins, N(0, I), scaled as x_T is."""
        number, _ = self.places(iteration)
        start = self.process.sigma[self.timesteps[0]]
        return start * philox_noise(number, self.key, int(NoiseRole.TRAJECTORY), self.shape)

    def advanced(self, sample: Tensor, prediction: Tensor, iteration: int) -> Tensor:
        """The states at ``iteration`` + 1, from those at ``iteration`` and what the sampling model predicts there."""
        _, step = self.places(iteration)
        at_end = _column(step + 1 == self.steps, sample)
        return torch.where(at_end, self.noise(iteration + 1), self.moved(sample, prediction, step))

    def moved(self, sample: Tensor, prediction: Tensor, step: Tensor) -> Tensor:
        """``sample``, each at its ``step`` int64 [B], one step on; at the last, where it was."""
        clean, noise = clean_and_noise(self.process, prediction.float(), sample, self.timesteps[step])
        following = self.timesteps[(step + 1).clamp(max=self.steps - 1)]
        alpha, sigma = (_column(value, sample) for value in self.process.coefficients(following))
        return alpha * clean + sigma * noise


def clean_and_noise(process: Process, prediction: Tensor, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The estimates of (x_0, eps), each [B, ...], that a prediction of any type at x_t makes."""
    alpha, sigma = (_column(value, sample) for value in process.coefficients(timesteps))
    match process.prediction_type:
        case "epsilon":
            return (sample - sigma * prediction) / alpha, prediction
        case "v_prediction":
            return alpha * sample - sigma * prediction, sigma * sample + alpha * prediction
        case "sample":
            return prediction, (sample - alpha * prediction) / sigma
        case _:
            return sample - sigma * prediction, sample + alpha * prediction


def _column(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (like.ndim - 1))
