"""The public EraseDiff loop for Stable Diffusion as its scripts run it, repaired, for comparison alone.

Written from what the scripts do, in plain torch. What is theirs and stays:

- per epoch, K inner passes over the whole forget set minimise L_f alone; then the weights are set back to the epoch's
  beginning, and an outer pass of as many steps minimises L_r + lambda (L_f - mean of the inner losses), whose last term
  is a constant;
- lambda is fixed (1.0 in the scripts for Stable Diffusion, 0.1 as their argument's default);
- one Adam serves both, so the outer pass begins with the moments of the inner one;
- the deviated target is what the model, as it is now, predicts for the anchor prompt.

What is repaired:

- the outer pass runs once per epoch, not once within each of the K inner passes with all but the last thrown away;
- a loader is read from beginning to end, not created anew for the first random batch of every step;
- the two losses draw timesteps and noise of their own, instead of the forget loss taking the retained batch's;
- only the UNet's weights are kept aside and set back, not the VAE's and the text encoder's too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from erasediff.diffusion import Batch, Denoiser, Process
from erasediff.diffusion.batch import condition_of
from erasediff.training.loop import Batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """``multiplier`` is their lambda, ``inner_passes`` their K; 1.0, 1 and 1e-5 are what their class script runs."""

    multiplier: float = 1.0
    inner_passes: int = 1
    lr: float = 1e-5


class PublishedLoop:
    """``step`` is one outer step, with the epoch's inner passes before its first.

    pass_length: batches in a pass over the forget set
    anchor:      the condition of the anchor prompt, one row
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        process: Process,
        denoiser: Denoiser,
        anchor: Batch,
        retain: Batches,
        forget: Batches,
        pass_length: int,
        settings: Published,
        seed: int,
    ) -> None:
        self.network, self.process, self.denoiser, self.anchor = network, process, denoiser, anchor
        self.retain, self.forget, self.pass_length, self.settings = retain, forget, pass_length, settings
        self.optimizer = torch.optim.Adam(network.parameters(), settings.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.outer_steps = self.inner_steps = 0

    def step(self) -> None:
        if self.outer_steps % self.pass_length == 0:
            self._inner_passes()
        self._descend(lambda: self._joint_loss(self.outer_steps))
        self.outer_steps += 1

    def _inner_passes(self) -> None:
        beginning = [parameter.detach().clone() for parameter in self.network.parameters()]
        total = 0.0
        count = self.settings.inner_passes * self.pass_length
        for _ in range(count):
            batch = self.forget.at(self.inner_steps)
            total += self._descend(lambda batch=batch: self._forget_loss(batch))
            self.inner_steps += 1
        self.inner_mean = total / count
        with torch.no_grad():
            for parameter, value in zip(self.network.parameters(), beginning, strict=True):
                parameter.copy_(value)

    def _joint_loss(self, index: int) -> Tensor:
        retained = self.retain.at(index)
        noisy_sample, timesteps, noise = self._noised(retained)
        predicted = self.denoiser(self.network, noisy_sample, timesteps, condition_of(retained))
        excess = self._forget_loss(self.forget.at(index)) - self.inner_mean
        return mse_loss(predicted, noise) + self.settings.multiplier * excess

    def _forget_loss(self, batch: Batch) -> Tensor:
        noisy_sample, timesteps, _ = self._noised(batch)
        anchor = {name: row.expand(len(timesteps), *row.shape[1:]) for name, row in self.anchor.items()}
        with torch.no_grad():
            target = self.denoiser(self.network, noisy_sample, timesteps, anchor)
        return mse_loss(self.denoiser(self.network, noisy_sample, timesteps, condition_of(batch)), target)

    def _noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        sample = batch["sample"]
        timesteps = torch.randint(self.process.num_train_timesteps, (len(sample),), generator=self.generator)
        noise = torch.randn(sample.shape, generator=self.generator)
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in self.process.coefficients(timesteps))
        return alpha * sample + sigma * noise, timesteps, noise

    def _descend(self, loss: Callable[[], Tensor]) -> float:
        self.optimizer.zero_grad()
        value = loss()
        value.backward()
        self.optimizer.step()
        return value.item()
