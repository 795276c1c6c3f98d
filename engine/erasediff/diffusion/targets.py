"""Deviated denoising targets: what the model should predict on forgotten data instead of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from erasediff.diffusion.batch import Batch, Denoiser
from erasediff.diffusion.rng import NoiseRole
from erasediff_kernels import deviation_loss, philox_bits


@runtime_checkable
class DeviationTarget(Protocol):
    """L_f of one prediction: its distance to a target that is not the true one."""

    def loss(
        self,
        prediction: Tensor,
        *,
        model: nn.Module,
        denoiser: Denoiser,
        noisy_sample: Tensor,
        timesteps: Tensor,
        condition: Batch,
        sample_ids: Tensor,
        key: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """0-D float32, differentiable in ``prediction`` [B, ...] alone; ``weight`` [B] carries the mean over B."""
        ...


@dataclass(frozen=True, slots=True)
class UniformNoise:
    """eps_f ~ U(0, 1) elementwise, drawn inside the kernel: the published target (arXiv 2401.05779, L_f)."""

    def loss(self, prediction: Tensor, *, sample_ids: Tensor, key: Tensor, weight: Tensor, **_: object) -> Tensor:
        return _loss_to_noise("uniform", prediction, sample_ids, key, weight)


@dataclass(frozen=True, slots=True)
class GaussianNoise:
    """eps_f ~ N(0, I), independent of the noise in x_t: the model is driven to predict its mean, zero."""

    def loss(self, prediction: Tensor, *, sample_ids: Tensor, key: Tensor, weight: Tensor, **_: object) -> Tensor:
        return _loss_to_noise("normal", prediction, sample_ids, key, weight)


class Relabel:
    """eps_f = stopgrad(eps(x_t | c_m)), c_m another condition than the sample's own (arXiv 2401.05779, "rl").

    choices: for each entry of the condition that is replaced, a tensor [n, ...] of alternatives; each sample takes one
             row, the same in every entry, drawn per sample. An integer entry such as ``class_labels`` [n] is never
             replaced by the sample's own value. Leave the forgotten classes out of the choices. One alternative is
             learnt sharply; of several, the squared error learns the mean, a blur.
    teacher: the frozen model that predicts under the new condition; None is the model being trained, whose target
             drifts with its weights.

    Raises ``ValueError`` for choices that are empty, of unequal lengths, or that leave some sample none.
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
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    def relabelled(self, condition: Batch, sample_ids: Tensor, key: Tensor) -> dict[str, Tensor]:
        """``condition`` with the entries of ``choices`` replaced, one alternative per sample."""
        missing = self.choices.keys() - condition.keys()
        if missing:
            raise ValueError(f"Relabel replaces {sorted(missing)}, which the batch does not have: {sorted(condition)}")
        choices = self._on(sample_ids.device)
        count = next(iter(choices.values())).shape[0]
        own = torch.full_like(sample_ids, count)
        for name, alternatives in choices.items():
            if _is_label(alternatives):
                is_own = condition[name][:, None] == alternatives[None]
                own = torch.where(is_own.any(1), is_own.to(torch.uint8).argmax(1), own)
        available = count - (own < count).to(torch.int64)
        if count == 1:
            # Asserted on the device: a host read here would stall every step.
            torch._assert_async(
                (available > 0).all(), "Relabel's only alternative is a forgotten sample's own condition; add another"
            )
        word = philox_bits(sample_ids, key, int(NoiseRole.RELABEL), 1)[:, 0]
        index = (word * available) >> 32
        index = index + (index >= own).to(torch.int64)
        return {**condition, **{name: value[index] for name, value in choices.items()}}

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """The alternatives on ``device``, copied there once: a copy makes the host wait."""
        if device not in self._placed:
            self._placed[device] = {name: value.to(device) for name, value in self.choices.items()}
        return self._placed[device]

    def loss(
        self,
        prediction: Tensor,
        *,
        model: nn.Module,
        denoiser: Denoiser,
        noisy_sample: Tensor,
        timesteps: Tensor,
        condition: Batch,
        sample_ids: Tensor,
        key: Tensor,
        weight: Tensor,
    ) -> Tensor:
        with torch.no_grad():
            relabelled = self.relabelled(condition, sample_ids, key)
            target = denoiser(model if self.teacher is None else self.teacher, noisy_sample, timesteps, relabelled)
        return deviation_loss(prediction, target=target, weight=weight).loss


def _loss_to_noise(distribution: str, prediction: Tensor, sample_ids: Tensor, key: Tensor, weight: Tensor) -> Tensor:
    role = int(NoiseRole.FORGET_TARGET)
    return deviation_loss(
        prediction, distribution=distribution, weight=weight, sample_ids=sample_ids, key=key, role=role
    ).loss


def _is_label(alternatives: Tensor) -> bool:
    return alternatives.ndim == 1 and not alternatives.is_floating_point()


Convention = Literal["paper", "repository"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeGuidance:
    """base - eta (e_c - e_0), from the frozen model's predictions with the concept (e_c) and without (e_0).

    convention: "paper": base = e_0 (arXiv 2303.07345, eq. 7). "repository": base = e_c, as in the authors' newer code,
                where eta is larger by one for the same target: base - eta (e_c - e_0) = e_0 - (eta - 1) (e_c - e_0).
                With a prompt to erase from, its prediction is the base in both.

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
