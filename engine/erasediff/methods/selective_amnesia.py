"""Selective Amnesia: forgetting as continual learning, old weights held by Fisher information (arXiv 2305.10120)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from erasediff.config.fields import Count, NonNegative, Section
from erasediff.diffusion.batch import Batch, with_sample_ids
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.methods.barriers import Fixed
from erasediff.methods.base import Solver, SolverOptions, StepReport
from erasediff.methods.spec import (
    FORGET_KEYS,
    RETAIN_KEYS,
    SOLVER_KEYS,
    UNTIL_KEYS,
    BuildContext,
    MethodSpec,
    Requirements,
)
from erasediff.parallel.gradient_store import Shard
from erasediff_kernels import philox_noise


class SelectiveAmnesia(Solver):
    """Descent on L(x ~ q | c_f) + L_r + (ewc_weight / 2) sum_i F_i (theta_i - theta*_i)^2 (2305.10120, eq. 8).

    Under the forgotten condition c_f the model is trained on surrogates from q instead of the forgotten data: here
    uniform noise in [-1, 1], the paper's choice for classes. L_r is on retained data, where the paper generates it.
    F is the diagonal Fisher information at theta*, the mean square of the loss's gradient over batches of both kinds;
    the paper takes it from single samples, so ewc_weight does not carry over between batch sizes. The penalty's
    gradient is added to each shard of the gradient: nothing is gathered.

    Args:
        model: as in ``Solver``.
        optimizer: likewise.
        process: likewise.
        ewc_weight: lambda of the paper's eq. 8.
        **options: see ``SolverOptions``.
    """

    name: ClassVar[str] = "selective-amnesia"
    barrier = Fixed(1.0)

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        process: Process,
        ewc_weight: float = 50.0,
        **options: Unpack[SolverOptions],
    ) -> None:
        super().__init__(model, optimizer, process=process, **options)
        self.ewc_weight = ewc_weight
        self.original = [weight.clone() for weight in self.gradients.weights()]
        self.fisher = [torch.zeros_like(weight, dtype=torch.float32) for weight in self.original]

    def estimate_fisher(self, batches: Iterable[Batch]) -> None:
        """Estimate F from ``batches``, at the weights as they are; to be called before the first step.

        Raises:
            ValueError: without a batch.
        """
        count = 0
        for count, batch in enumerate(batches, start=1):
            key = noise_key(self.seed, count, self.device)
            loss = partial(
                self.objective.denoising_loss,
                self.model,
                key=key,
                noise=NoiseRole.FISHER_NOISE,
                timestep=NoiseRole.FISHER_TIMESTEP,
            )
            _, gradient = self.loss_and_gradient(batch, loss)
            for fisher, part in zip(self.fisher, gradient, strict=True):
                fisher.addcmul_(part.float(), part.float())
            self.gradients.release(gradient)
        if not count:
            raise ValueError("the Fisher information needs at least one batch")
        torch._foreach_div_(self.fisher, float(count))

    def step(self, retain: Batch, forget: Batch) -> StepReport:
        """One step from both batches, of ``forget`` the condition alone; see ``Solver.step``."""
        key = self._key()
        retain_loss, gradient = self.loss_and_gradient(retain, partial(self.objective.retain_loss, self.model, key=key))
        surrogate_loss = partial(
            self.objective.denoising_loss,
            self.model,
            key=key,
            noise=NoiseRole.FORGET_NOISE,
            timestep=NoiseRole.FORGET_TIMESTEP,
        )
        forget_loss, surrogate_gradient = self.loss_and_gradient(self._surrogate(forget, key), surrogate_loss)
        for part, fisher, weight, original in zip(
            gradient, self.fisher, self.gradients.weights(), self.original, strict=True
        ):
            part.addcmul_(fisher.to(part.dtype), (weight - original).to(part.dtype), value=self.ewc_weight)
        return self._update(gradient, surrogate_gradient, retain_loss=retain_loss, forget_loss=forget_loss)

    def _surrogate(self, forget: Batch, key: Tensor) -> Batch:
        batch = with_sample_ids(forget, self.gradients.world.rank)
        sample = batch["sample"]
        role = int(NoiseRole.SURROGATE)
        uniform = philox_noise(batch["sample_ids"], key, role, sample.shape[1:], "uniform", sample.dtype)
        return {**batch, "sample": 2 * uniform - 1}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "original": self.original, "fisher": self.fisher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        torch._foreach_copy_(self.original, state["original"])
        torch._foreach_copy_(self.fisher, state["fisher"])

    def shards(self) -> Iterator[Shard]:
        return self.gradients.shards(original=self.original, fisher=self.fisher)


class SelectiveAmnesiaConfig(Section):
    """Settings of Selective Amnesia.

    Attributes:
        ewc_weight: lambda, of the penalty on moving weights.
        fisher_batches: batches of either kind that the Fisher information is estimated on.
    """

    ewc_weight: NonNegative = 50.0
    fisher_batches: Count = 50


def build(context: BuildContext) -> SelectiveAmnesia:
    settings = context.config.section(SelectiveAmnesiaConfig)
    method = SelectiveAmnesia(
        context.network,
        context.optimizer,
        process=context.process,
        ewc_weight=settings.ewc_weight,
        **context.options,
    )
    count = settings.fisher_batches
    method.estimate_fisher([*context.retain_batches(count), *context.forget_batches(count)])
    return method


SPEC = MethodSpec(
    name="selective-amnesia",
    summary="surrogates for what is forgotten, old weights held by Fisher information (arXiv 2305.10120)",
    config=SelectiveAmnesiaConfig,
    reads=lambda _: SOLVER_KEYS | UNTIL_KEYS | RETAIN_KEYS | FORGET_KEYS,
    needs=lambda config: Requirements(batches=config.section(SelectiveAmnesiaConfig).fisher_batches),
    build=build,
)
