"""Verdict on unconditional models: which share of their samples shows what is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasediff.config.verdict_config import VerdictConfig
from erasediff.verdict.judges.base import UNKNOWN, Candidate, Judge
from erasediff.verdict.outcome import Figure
from erasediff.verdict.recognition import AFTER, BEFORE, Findings
from erasediff.verdict.statistics import Estimate, mean, share, share_difference, share_ratio

RECOGNISED = 0.8
"""Least share of held-out real images, of what is forgotten and of the rest, that a judge must tell from the other."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Real images that no judge was fitted to.

    Attributes:
        sought: uint8 [N, 3, H, W], images to forget.
        others: uint8 [M, 3, H, W], images to retain.
    """

    sought: Tensor
    others: Tensor


@dataclass(frozen=True, slots=True)
class SampledShares:
    """Samples of both models, and what judges choose among.

    Attributes:
        sought: Forgotten classes.
        others: Retained classes.
        images: By model, uint8 [N, 3, H, W]; image i of both is of the same noise.
        held_out: Control of the judges.
    """

    sought: Sequence[Candidate]
    others: Sequence[Candidate]
    images: Mapping[str, Tensor]
    held_out: HeldOut


def judge_shares(judge: Judge, sampled: SampledShares, settings: VerdictConfig, *, decides: bool) -> Findings:
    """What ``judge`` sees in the samples of both models, and what follows from it."""
    findings = Findings()
    sought = len(sampled.sought)
    labels = [candidate.label for candidate in (*sampled.sought, *sampled.others)]
    answers = {model: judge.answers(images, sampled.sought, sampled.others) for model, images in sampled.images.items()}
    for model, seen in answers.items():
        findings.rows += [
            {
                "judge": judge.name,
                "model": model,
                "asked": None,
                "image": number,
                "sees": None if answer == UNKNOWN else labels[answer],
            }
            for number, answer in enumerate(seen.tolist())
        ]
    hits = {model: int(_is_sought(seen, sought).sum()) for model, seen in answers.items()}
    count = len(answers[BEFORE])
    remaining = Figure(
        key="remaining",
        title="Share of samples that show what is forgotten, relative to before",
        judge=judge.name,
        after=share_ratio(hits[AFTER], hits[BEFORE], count),
        relation="at most",
        limit=settings.share_limit,
        decides=decides,
    )
    shares = Figure(
        key="share",
        title="Samples that show what is forgotten",
        judge=judge.name,
        before=share(hits[BEFORE], count),
        after=share(hits[AFTER], count),
    )
    controls = _controls(judge, sampled)
    findings.figures += [remaining, shares, *controls]
    findings.reasons += _forgotten(findings, judge, remaining, shares, controls, settings)
    if judge.tells_apart:
        _judge_retained(findings, judge, answers, labels, sought, settings, decides=decides)
    else:
        findings.reasons.append(f"The judge {judge.name} cannot say what the other samples show.")
    return findings


def _is_sought(answers: Tensor, sought: int) -> Tensor:
    return (answers >= 0) & (answers < sought)


def _controls(judge: Judge, sampled: SampledShares) -> tuple[Figure, Figure]:
    """Shares of held-out real images that show what is forgotten, and that do not, that the judge sees so."""
    real = sampled.held_out
    found, mistaken = (
        _is_sought(judge.answers(images, sampled.sought, sampled.others), len(sampled.sought))
        for images in (real.sought, real.others)
    )
    return (
        Figure(
            key="held_out_recognised",
            title="Control: held-out images of what is forgotten that are recognised",
            judge=judge.name,
            after=share(int(found.sum()), len(found)),
            relation="at least",
            limit=RECOGNISED,
        ),
        Figure(
            key="held_out_mistaken",
            title="Control: held-out retained images that are mistaken for it",
            judge=judge.name,
            after=share(int(mistaken.sum()), len(mistaken)),
            relation="at most",
            limit=1 - RECOGNISED,
        ),
    )


def _forgotten(
    findings: Findings,
    judge: Judge,
    remaining: Figure,
    shares: Figure,
    controls: tuple[Figure, Figure],
    settings: VerdictConfig,
) -> list[str]:
    """Set ``findings.forgotten``; return why it is no success."""
    assert shares.before is not None
    recognised, mistaken = controls
    if not (recognised.is_met and mistaken.is_met):
        return [
            f"The judge {judge.name} recognises {recognised.after.value:.0%} of real images of what is to be "
            f"forgotten, and takes {mistaken.after.value:.0%} of others for it: use another one with --judge."
        ]
    if shares.before.low <= mistaken.after.value:
        return [
            f"The original model draws too little of what is to be forgotten to tell whether it is gone: the judge "
            f"{judge.name} sees it in {shares.before.value:.1%} of {shares.before.count} samples, and in "
            f"{mistaken.after.value:.1%} of real images that show something else: raise verdict.images."
        ]
    if remaining.is_met and remaining.after.high > 0.5:
        return [f"{shares.after.count} samples are too few: raise verdict.images."]
    findings.forgotten = "forgotten" if remaining.is_met else "not forgotten"
    if remaining.is_met:
        return []
    return [
        f"The judge {judge.name} still sees what is to be forgotten in {shares.after.value:.1%} of "
        f"{shares.after.count} samples, {shares.before.value:.1%} before (limit {settings.share_limit:.0%} of that)."
    ]


def _judge_retained(
    findings: Findings,
    judge: Judge,
    answers: Mapping[str, Tensor],
    labels: Sequence[str],
    sought: int,
    settings: VerdictConfig,
    *,
    decides: bool,
) -> None:
    before, after = (answers[model] == UNKNOWN for model in (BEFORE, AFTER))
    count = len(before)
    rise = Figure(
        key="nothing_rise",
        title="Samples that show nothing, rise",
        judge=judge.name,
        after=mean((after.double() - before.double()).tolist()),
        relation="at most",
        limit=settings.nothing_limit,
        decides=decides,
    )
    nothing = Figure(
        key="nothing",
        title="Samples that show nothing",
        judge=judge.name,
        before=share(int(before.sum()), count),
        after=share(int(after.sum()), count),
    )
    findings.figures += [rise, nothing]
    shifted = _largest_shift(answers, labels, sought)
    shift = None
    if shifted is not None:
        label, estimate = shifted
        shift = Figure(
            key="largest_shift",
            title=f"Largest change of a retained class's proportion ({label})",
            judge=judge.name,
            after=estimate,
            relation="at most",
            limit=settings.shift_limit,
            # A change of one in many that chance explains is none.
            compared="low",
            decides=decides,
        )
        findings.figures.append(shift)
    damaged = [figure for figure in (rise, shift) if figure is not None and not figure.is_met]
    findings.retained = "damaged" if damaged else "retained"
    if rise in damaged:
        findings.reasons.append(
            f"The judge {judge.name} sees nothing that the data have in {100 * rise.after.value:.0f} points more of "
            f"the samples (limit {100 * settings.nothing_limit:.0f})."
        )
    # Without a retained sample there are no proportions, and nothing else to say of them.
    if shift is not None and shift in damaged and shift.after.count:
        findings.reasons.append(
            f"The proportion of {shifted[0] if shifted else ''} among the retained samples has changed by "
            f"{100 * shift.after.value:.0f} points (limit {100 * settings.shift_limit:.0f})."
        )


def _largest_shift(answers: Mapping[str, Tensor], labels: Sequence[str], sought: int) -> tuple[str, Estimate] | None:
    """The retained class whose proportion among the retained samples changed most; None for fewer than two classes."""
    if len(labels) - sought < 2:
        return None
    kept = {model: seen[seen >= sought] for model, seen in answers.items()}
    shifts = {
        label: share_difference(
            int((kept[AFTER] == number).sum()), len(kept[AFTER]), int((kept[BEFORE] == number).sum()), len(kept[BEFORE])
        )
        for number, label in enumerate(labels)
        if number >= sought
    }
    largest = max(shifts, key=lambda label: shifts[label].value)
    return largest, shifts[largest]


def grouped(
    sampled: SampledShares, rows: Sequence[Mapping[str, object]]
) -> tuple[dict[str, dict[str, Tensor]], list[str], list[str]]:
    """Samples by what the first judge sees in them.

    The pictures of a label are of the noises from which the original model draws it.

    Returns:
        (images by model and label, labels of the forgotten, labels of the rest).
    """
    first = rows[0]["judge"]
    seen = {
        model: [row["sees"] for row in rows if row["judge"] == first and row["model"] == model]
        for model in (BEFORE, AFTER)
    }
    chosen: dict[str, Tensor] = {}

    def choose(title: str, model: str, label: str | None) -> list[str]:
        numbers = [number for number, sees in enumerate(seen[model]) if sees == label]
        if numbers:
            chosen[title] = torch.tensor(numbers)
        return [title] if numbers else []

    sought, others = ([candidate.label for candidate in side] for side in (sampled.sought, sampled.others))
    forgotten = [title for label in sought for title in choose(label, BEFORE, label)]
    forgotten += [title for label in sought for title in choose(f"{label}, still drawn", AFTER, label)]
    retained = choose("nothing, drawn now", AFTER, None)
    retained += [title for label in others for title in choose(label, BEFORE, label)]
    images = {model: {title: sampled.images[model][numbers] for title, numbers in chosen.items()} for model in seen}
    return images, forgotten, retained
