"""Deviated denoising targets for forgotten data: independent noise, another condition, negative guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.rng import NoiseRole
from erasediff.diffusion.trajectories import clean_and_noise
from erasediff_kernels import deviation_loss, philox_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class LossContext:
    """The states that a micro-batch of b samples was predicted at, for a ``DeviationTarget``.

    Attributes:
        model: the network that is trained.
        denoiser: its call.
        process: noise schedule and prediction type.
        noisy_sample: x_t [b, ...].
        timesteps: train timesteps, int64 [b].
        condition: the entries that ``model`` predicted under, each [b, ...].
        sample_ids: int64 [b], the samples' slots in the global batch.
        key: int64 [2] of ``noise_key``.
        weight: [b], 1 / B and the min-SNR weight of a loss in the units of the model's own predictions.
        noise_weight: [b], likewise of a loss in the units of noise.
    """

    model: nn.Module
    denoiser: Denoiser
    process: Process
    noisy_sample: Tensor
    timesteps: Tensor
    condition: Batch
    sample_ids: Tensor
    key: Tensor
    weight: Tensor
    noise_weight: Tensor

    def predicted_noise(self, prediction: Tensor) -> Tensor:
        """The estimate of eps, [b, ...], that ``prediction`` of any type makes at x_t; itself if it is one."""
        if self.process.prediction_type == "epsilon":
            return prediction
        return clean_and_noise(self.process, prediction.float(), self.noisy_sample, self.timesteps)[1]


@runtime_checkable
class DeviationTarget(Protocol):
    """L_f of one prediction: its distance to a target that deviates from the true one."""

    def loss(self, prediction: Tensor, context: LossContext) -> Tensor:
        """The loss of a micro-batch, 0-D float32, differentiable in ``prediction`` [b, ...] alone."""
        ...


TargetSpace = Literal["noise", "prediction"]


@dataclass(frozen=True, slots=True)
class _Noise:
    """Noise independent of that in x_t as the target.

    Attributes:
        space: "noise" (default): L_f = E |eps_f - eps_theta(x_t)|^2 as published, eps_theta being the noise that the
            prediction implies at x_t: v-prediction sigma x_t + alpha v, flow x_t + alpha v, x_0-prediction
            (x_t - alpha x_0) / sigma. A model has the same L_f whatever its parametrisation, with min-SNR weights of
            the noise. "prediction": the raw prediction of any type is compared to eps_f. Both are one for
            epsilon-prediction.

    Raises:
        ValueError: for another space.
    """

    space: TargetSpace = "noise"
    distribution: ClassVar[str]

    def __post_init__(self) -> None:
        if self.space not in get_args(TargetSpace):
            raise ValueError(f"space must be noise or prediction, got {self.space!r}")

    def loss(self, prediction: Tensor, context: LossContext) -> Tensor:
        """The loss of a micro-batch; eps_f is drawn inside the kernel."""
        noise = self.space == "noise"
        return deviation_loss(
            context.predicted_noise(prediction) if noise else prediction,
            distribution=self.distribution,
            weight=context.noise_weight if noise else context.weight,
            sample_ids=context.sample_ids,
            key=context.key,
            role=int(NoiseRole.FORGET_TARGET),
        ).loss


@dataclass(frozen=True, slots=True)
class UniformNoise(_Noise):
    """eps_f ~ U(0, 1) elementwise: the published target (arXiv 2401.05779, L_f)."""

    distribution: ClassVar[str] = "uniform"


@dataclass(frozen=True, slots=True)
class GaussianNoise(_Noise):
    """eps_f ~ N(0, I), independent of the noise in x_t: the model is driven to predict its mean, zero."""

    distribution: ClassVar[str] = "normal"


def check_frozen(teacher: nn.Module) -> nn.Module:
    """``teacher``, if it is in evaluation mode and none of its parameters requires a gradient.

    Raises:
        ValueError: otherwise. It is not frozen here: it may be the very model that is trained.
    """
    if teacher.training or any(parameter.requires_grad for parameter in teacher.parameters()):
        raise ValueError("a teacher must be frozen: pass copy.deepcopy(model).requires_grad_(False).eval()")
    return teacher


class Relabel:
    """eps_f = stopgrad(eps(x_t | c_m)), c_m another condition than the sample's own (arXiv 2401.05779, "rl").

    Args:
        choices: for each entry of the condition that is replaced, a tensor [n, ...] of alternatives; each sample takes
            one row, the same in every entry, drawn per sample. An integer entry such as ``class_labels`` [n] is never
            replaced by the sample's own value. Leave the forgotten classes out of the choices. One alternative is
            learnt sharply; of several, the squared error learns the mean, a blur.
        teacher: the frozen model that predicts under the new condition (no gradients, evaluation mode); None is the
            model being trained, whose target drifts with its weights.

    Raises:
        ValueError: for choices that are empty, of unequal lengths, or that leave some sample none, and for a teacher
            that is not frozen.
    """

    def __init__(self, choices: Mapping[str, Tensor], teacher: nn.Module | None = None) -> None:
        lengths = {name: value.shape[0] if value.ndim else 0 for name, value in choices.items()}
        if not lengths or 0 in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(
                f"Relabel needs the same number of alternatives, at least one, in each entry, got {lengths}"
            )
        labels = [value for value in choices.values() if _is_label(value)]
        if any(len(set(value.tolist())) != value.numel() for value in labels):
            raise ValueError("Relabel's alternatives must differ from each other")
        self.choices = dict(choices)
        self._placed: dict[torch.device, dict[str, Tensor]] = {}
        self.teacher = None if teacher is None else check_frozen(teacher)

    def relabelled(self, condition: Batch, sample_ids: Tensor, key: Tensor) -> dict[str, Tensor]:
        """``condition`` with the entries of ``choices`` replaced, one alternative per sample."""
        missing = self.choices.keys() - condition.keys()
        if missing:
            raise ValueError(f"Relabel replaces {sorted(missing)}, which the batch does not have: {sorted(condition)}")
        choices = self._on(sample_ids.device)
        count = next(iter(choices.values())).shape[0]
        own_index = torch.full_like(sample_ids, count)
        for name, alternatives in choices.items():
            if _is_label(alternatives):
                is_own = condition[name][:, None] == alternatives[None]
                own_index = torch.where(is_own.any(1), is_own.to(torch.uint8).argmax(1), own_index)
        available = count - (own_index < count).to(torch.int64)
        if count == 1:
            # Asserted on the device: a host read here would stall every step.
            torch._assert_async(
                (available > 0).all(), "Relabel's only alternative is a forgotten sample's own condition; add another"
            )
        word = philox_bits(sample_ids, key, int(NoiseRole.RELABEL), 1)[:, 0]
        index = (word * available) >> 32
        index = index + (index >= own_index).to(torch.int64)
        return {**condition, **{name: value[index] for name, value in choices.items()}}

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The alternatives on ``device``, copied there once: a copy makes the host wait."""
        if device not in self._placed:
            self._placed[device] = {name: value.to(device) for name, value in self.choices.items()}
        return self._placed[device]

    def loss(self, prediction: Tensor, context: LossContext) -> Tensor:
        """The loss of a micro-batch; the target is in the units of the model's own predictions."""
        with torch.no_grad():
            relabelled = self.relabelled(context.condition, context.sample_ids, context.key)
            conditioning = context.process.conditioning[context.timesteps]
            teacher = context.model if self.teacher is None else self.teacher
            target = context.denoiser(teacher, context.noisy_sample, conditioning, relabelled)
        return deviation_loss(prediction, target=target, weight=context.weight).loss


def _is_label(alternatives: Tensor) -> bool:
    return alternatives.ndim == 1 and not alternatives.is_floating_point()


Convention = Literal["paper", "repository"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeGuidance:
    """base - eta (e_c - e_0), from the frozen model's predictions with the concept (e_c) and without (e_0).

    Attributes:
        eta: strength of the guidance, not negative.
        convention: "paper": base = e_0 (arXiv 2303.07345, eq. 7). "repository": base = e_c, as in the authors' newer
            code, where eta is larger by one for the same target: base - eta (e_c - e_0) =
            e_0 - (eta - 1) (e_c - e_0). With a prompt to erase from, its prediction is the base in both.

    Velocities and predictions of x_0 are affine in the score at a given x_t with coefficients that sum alike on both
    sides, so the same combination of them is the same combination of scores: it holds for every prediction type.
    """

    eta: float = 1.0
    convention: Convention = "paper"

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta must not be negative (it would guide towards the concept), got {self.eta}")
        if self.convention not in ("paper", "repository"):
            raise ValueError(f"convention must be paper or repository, got {self.convention!r}")

    def target(self, concept: Tensor, null: Tensor, erase_from: Tensor | None = None) -> Tensor:
        """Like ``concept`` [B, ...]: e_c, e_0 and, perhaps, the prediction with the prompt to erase from."""
        if erase_from is None:
            erase_from = null if self.convention == "paper" else concept
        return erase_from - self.eta * (concept - null)
