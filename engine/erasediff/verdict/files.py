"""Verdict on listed images: whether the model still reproduces them, or betrays by its loss that it saw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.config.verdict_config import VerdictConfig
from erasediff.evaluation.memorization import nearest, reproduces
from erasediff.verdict.outcome import Figure
from erasediff.verdict.recognition import AFTER, BEFORE, Findings
from erasediff.verdict.statistics import Estimate, area_under_curve, mean, share, share_ratio

REPRODUCTION, LOSS = "reproduction", "loss"
"""What takes the place of a judge in rows."""
FORGOTTEN, RETAINED, UNSEEN = "forgotten", "retained", "unseen"


def reproduced(drawn: Sequence[Tensor], training: Sequence[Tensor], forgotten: int) -> Tensor:
    """Which image to forget each drawn one reproduces: int64 [M], -1 for none.

    Args:
        drawn: [M, ...] of each view, as of ``reproduces``.
        training: [N, ...] of each view, images to forget first; they differ from each other.
        forgotten: Number of images to forget.
    """
    _, index = nearest(drawn[0], training[0])
    again = reproduces(drawn, training, index) & (index < forgotten)
    return torch.where(again, index, -1)


@dataclass(frozen=True, slots=True)
class FileEvidence:
    """Measurements of both models.

    Attributes:
        reproduced: By model, int64 [M], the image to forget that each drawn one reproduces, or -1.
        asks: What each drawn image was asked for; "" for nothing.
        files: Names of the images to forget.
        losses: By model and set ("forgotten", "retained" and, where there are some, "unseen"), float32 [n].
        names: Names of the images of each set of losses.
    """

    reproduced: Mapping[str, Tensor]
    asks: Sequence[str]
    files: Sequence[str]
    losses: Mapping[str, Mapping[str, Tensor]]
    names: Mapping[str, Sequence[str]]


def judge_files(evidence: FileEvidence, settings: VerdictConfig) -> Findings:
    """What follows from reproduction and losses.

    A test by which the original model shows nothing of the images cannot tell: the verdict is that of those that can,
    all of which are to be passed.
    """
    findings = Findings(rows=_rows(evidence))
    passed = [
        outcome
        for outcome in (_reproduction(findings, evidence, settings), _membership(findings, evidence, settings))
        if outcome is not None
    ]
    if passed:
        findings.forgotten = "forgotten" if all(passed) else "not forgotten"
    elif not findings.reasons:
        findings.reasons.append(_untold(evidence))
    _judge_retained(findings, evidence, settings)
    return findings


def _untold(evidence: FileEvidence) -> str:
    if UNSEEN in evidence.names:
        return (
            "The original model neither reproduces the images to forget nor tells them from unseen ones by its loss, "
            "so there is nothing to see of them in either model."
        )
    return (
        "The original model does not reproduce the images to forget: give images that it was not trained on, with "
        "--unseen-data, to compare losses with."
    )


def _reproduction(findings: Findings, evidence: FileEvidence, settings: VerdictConfig) -> bool | None:
    """Whether the models' draws say that the images are forgotten; None where they cannot tell."""
    hits = {model: int((found >= 0).sum()) for model, found in evidence.reproduced.items()}
    count = len(evidence.asks)
    before, after = (share(hits[model], count) for model in (BEFORE, AFTER))
    remaining = share_ratio(hits[AFTER], hits[BEFORE], count)
    tells = hits[BEFORE] > 0 and (remaining.value > settings.share_limit or remaining.high <= 0.5)
    figure = Figure(
        key="reproduced_remaining",
        title="Draws that reproduce an image to forget, relative to before",
        judge=REPRODUCTION,
        after=remaining,
        relation="at most",
        limit=settings.share_limit,
        decides=tells,
    )
    if hits[BEFORE]:
        findings.figures.append(figure)
    findings.figures.append(
        Figure(
            key="reproduced",
            title="Draws that reproduce an image to forget",
            judge=REPRODUCTION,
            before=before,
            after=after,
        )
    )
    if not tells:
        if hits[BEFORE]:
            findings.reasons.append(
                f"{hits[BEFORE]} of {count} draws of the original model reproduce an image to forget, too few to tell "
                "whether they are gone: raise verdict.images."
            )
        return None
    if not figure.is_met:
        findings.reasons.append(
            f"{after.value:.0%} of {count} draws still reproduce an image to forget, {before.value:.0%} before."
        )
    return bool(figure.is_met)


def _membership(findings: Findings, evidence: FileEvidence, settings: VerdictConfig) -> bool | None:
    """Whether the loss says that the images are forgotten; None where it cannot tell."""
    losses = evidence.losses
    rise = (losses[AFTER][FORGOTTEN] - losses[BEFORE][FORGOTTEN]) / losses[BEFORE][FORGOTTEN]
    findings.figures.append(
        Figure(key="loss_rise", title="Loss of the images to forget, relative rise", after=mean(rise.tolist()))
    )
    others = UNSEEN if UNSEEN in evidence.names else RETAINED
    before, after = (area_under_curve(losses[model][FORGOTTEN], losses[model][others]) for model in (BEFORE, AFTER))
    if others == RETAINED:
        # The original has seen both: that it cannot tell them apart says nothing of what it knows.
        findings.figures.append(
            Figure(
                key="auc_retained",
                title="Forgotten images told from retained ones by a lower loss (AUC)",
                before=before,
                after=after,
            )
        )
        return None
    is_known = before.low > 0.5 and before.value > settings.auc_limit
    tells = is_known and _is_told(after, settings.auc_limit)
    figure = Figure(
        key="auc_unseen",
        title="Forgotten images told from unseen ones by a lower loss (AUC)",
        before=before,
        after=after,
        relation="at most",
        limit=settings.auc_limit,
        decides=tells,
    )
    findings.figures.append(figure)
    if not tells:
        if is_known:
            findings.reasons.append(f"{after.count} losses are too few to tell forgotten images from unseen ones.")
        return None
    if not figure.is_met:
        findings.reasons.append(
            f"The loss still tells forgotten images from unseen ones: AUC {after.value:.2f}, {before.value:.2f} before "
            f"(limit {settings.auc_limit:.2f})."
        )
    return bool(figure.is_met)


def _is_told(after: Estimate, limit: float) -> bool:
    """Whether there are enough images: an AUC within the limit may not be far beyond it by chance."""
    return after.value > limit or after.high <= (1 + limit) / 2


def _judge_retained(findings: Findings, evidence: FileEvidence, settings: VerdictConfig) -> None:
    before, after = (evidence.losses[model][RETAINED] for model in (BEFORE, AFTER))
    if not len(before):
        findings.reasons.append("No image that is to be retained is still there.")
        return
    rise = Figure(
        key="retained_loss_rise",
        title="Loss of retained images, rise relative to their mean before",
        after=mean(((after - before) / before.mean()).tolist()),
        relation="at most",
        limit=settings.loss_limit,
        decides=True,
    )
    findings.figures.append(rise)
    findings.retained = "retained" if rise.is_met else "damaged"
    if not rise.is_met:
        findings.reasons.append(
            f"The loss of retained images has risen by {rise.after.value:.0%} (limit {settings.loss_limit:.0%})."
        )


def _rows(evidence: FileEvidence) -> list[dict[str, object]]:
    draws: list[dict[str, object]] = [
        {
            "judge": REPRODUCTION,
            "model": model,
            "asked": ask or None,
            "image": number,
            "sees": evidence.files[index] if index >= 0 else None,
        }
        for model, found in evidence.reproduced.items()
        for number, (ask, index) in enumerate(zip(evidence.asks, found.tolist(), strict=True))
    ]
    losses: list[dict[str, object]] = [
        {"judge": LOSS, "model": model, "set": name, "image": image, "loss": loss}
        for model, sets in evidence.losses.items()
        for name, values in sets.items()
        for image, loss in zip(evidence.names[name], values.tolist(), strict=True)
    ]
    return [*draws, *losses]
