"""Collapse guard: looks at the retained data's denoising loss, and stops a run that destroys what it should keep."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.config import RunConfig
from erasediff.diffusion.batch import Batch, micro_batches
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.io.jsonl import Record
from erasediff.methods import Solver
from erasediff.parallel.control_plane import ControlPlane

SAMPLES, MOST_BATCHES = 16, 4
"""A look is at the first retained batch, or at as many as ``SAMPLES`` take: at most ``MOST_BATCHES``."""
DRIFT = "retain_drift"
"""Metric of a step with a look: the retained loss over that before the first step."""


class RetainedLoss:
    """Denoising loss of fixed retained samples: true noise, no Min-SNR weights, evenly spread timesteps.

    Each evaluation is of the same samples, noises and timesteps, so two of them differ by the weights alone.

    Args:
        method: Solver whose network is evaluated, as its steps are: in micro-batches, in its precision.
        batches: This rank's parts of retained batches, one or more.
    """

    def __init__(self, method: Solver, batches: Iterable[Batch]) -> None:
        self.method = method
        self.batches = list(batches)
        self._objective = dataclasses.replace(method.objective, min_snr_gamma=None)

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Mean loss over the samples of all ranks, 0-D float32, the same on each. A collective.

        torch's random state stays as it is, and what a network draws from it (dropout) is the same at each call.
        """
        device = self.method.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.method.seed)
            total = torch.zeros((), device=device)
            for number, batch in enumerate(self.batches):
                total = total + self._loss(number, batch)
        return self.method.gradients.world.mean(total / len(self.batches))

    def _loss(self, number: int, batch: Batch) -> Tensor:
        method, train_timesteps = self.method, self._objective.process.num_train_timesteps
        size = batch["sample"].shape[0] * method.gradients.world.size
        key = noise_key(method.seed, number, method.device)
        total = torch.zeros((), device=method.device)
        for part, weight in micro_batches(batch, method.accumulation_steps, method.gradients.world.rank):
            slots = part["sample_ids"] + number * size
            timesteps = (2 * slots + 1) * train_timesteps // (2 * size * len(self.batches))
            total = total + self._objective.denoising_loss_at(
                method.model, part, weight, timesteps, key=key, noise=NoiseRole.DRIFT
            )
        return total


@dataclass(frozen=True, slots=True)
class Collapse:
    """Collapse of a run: ``before`` and ``after`` are the retained losses before the first step and after ``step``.

    Attributes:
        best: The last step whose weights were within the limit, and are the network's again; None if the run kept none.
        best_loss: Retained loss after that step.
    """

    step: int
    before: float
    after: float
    best: int | None
    best_loss: float | None


class CollapseGuard:
    """Guard against runs that destroy what they should keep, by the retained loss at regular looks.

    Looked at are the weights that would be saved, the averaged ones. Two looks in a row beyond ``drift_limit`` times
    the loss before the first step stop the run, so that a transient does not; one is enough after the last step, whose
    weights are the result. Of the weights at the last look within the limit there is a copy on the host, which
    ``roll_back`` restores. Where every rank holds all weights, the main one keeps it alone. A run from scratch is
    stopped where it denoises worse than its initial weights.

    Ranks call each method together, and decide alike: the loss that they look at has the same bits on each.

    Args:
        loss: Loss to look at.
        settings: Interval and limit.
        steps: Steps of the whole run.
    """

    def __init__(self, loss: RetainedLoss, settings: RunConfig, steps: int) -> None:
        self.collapse: Collapse | None = None
        """Set by the look that stops the run."""
        self._loss = loss
        self._gradients = loss.method.gradients
        self._every, self._limit, self._steps = settings.look_every, settings.drift_limit, steps
        self._original = math.nan
        self._was_beyond = False
        self._best: tuple[int, float] | None = None
        self._copies: list[Tensor] | None = None

    def begin(self) -> None:
        """Measure the original weights, before the first step or the restoration of a checkpoint."""
        self._original = float(self._loss.evaluate())

    def resume(self, step: int, metrics: Iterable[Record]) -> None:
        """Continue after ``step``, with the metrics so far, those of the main rank.

        What the last look saw is among them. If that was within the limit, the weights that are resumed from are looked
        at, though no look was due: they are the earliest that there are to roll back to.
        """
        drifts = [record[DRIFT] for record in metrics if DRIFT in record and record["step"] <= step]
        self._was_beyond = ControlPlane.current().broadcast_object(bool(drifts) and self._is_beyond(drifts[-1]))
        if self._has_reference and 0 < step < self._steps and not self._was_beyond:
            self._look(step)

    def look_after(self, step: int) -> Tensor | None:
        """Look at the weights after ``step``, if that is due; ``collapse`` is set where the run should stop.

        Returns:
            The loss over the original one, 0-D float64 on the device; None without a look.
        """
        if not self._has_reference or (step % self._every and step != self._steps):
            return None
        loss, drift = self._look(step)
        is_beyond = self._is_beyond(drift)
        if is_beyond and (self._was_beyond or step == self._steps):
            best, best_loss = self._best or (None, None)
            self.collapse = Collapse(step, self._original, loss, best, best_loss)
        self._was_beyond = is_beyond
        return torch.tensor(drift, dtype=torch.float64, device=self._gradients.device)

    def extend(self, steps: int) -> None:
        """Make the run one of ``steps`` steps."""
        self._steps = steps

    @torch.no_grad()
    def roll_back(self) -> None:
        """Restore the weights of the best look, and their averages: see ``Collapse.best``."""
        if self._copies is not None:
            for _, _, tensors in self._gradients.shards(best=self._copies):
                for kind in tensors.keys() & {"weight", "ema"}:
                    tensors[kind].copy_(tensors["best"])
        self._gradients.refresh()

    @property
    def _has_reference(self) -> bool:
        """False for an original whose loss is not finite: its steps are skipped, which ends the run."""
        return math.isfinite(self._original)

    def _look(self, step: int) -> tuple[float, float]:
        """(loss, loss over the original one) of the averaged weights, which are kept if they are within the limit."""
        with self._loss.method.averaged_weights():
            loss = float(self._loss.evaluate())
            drift = loss / max(self._original, sys.float_info.min)
            if not self._is_beyond(drift):
                self._best = step, loss
                self._keep()
        return loss, drift

    def _is_beyond(self, drift: float | None) -> bool:
        """Also true for a loss that is not finite, which is None in the metrics."""
        return drift is None or not drift <= self._limit

    @torch.no_grad()
    def _keep(self) -> None:
        """Copy this rank's weights to the host."""
        if self._gradients.replicated and not self._gradients.world.is_main:
            return
        weights = self._gradients.weights()
        if self._copies is None:
            # Pinned, so that a copy from a GPU waits for nothing.
            self._copies = [torch.empty_like(w, device="cpu", pin_memory=w.is_cuda) for w in weights]
        for copy, weight in zip(self._copies, weights, strict=True):
            copy.copy_(weight, non_blocking=True)
