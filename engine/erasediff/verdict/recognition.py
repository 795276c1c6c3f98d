"""Verdict on captions and classes: whether what the model draws of them still shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from erasediff.config.verdict_config import VerdictConfig
from erasediff.verdict.candidates import Chosen
from erasediff.verdict.distance import noise_predictions, relative_distances
from erasediff.verdict.examined import ExaminedModel
from erasediff.verdict.judges.base import UNKNOWN, Candidate, Judge
from erasediff.verdict.judges.original import samples_of
from erasediff.verdict.outcome import Figure, Forgotten, Retained, Verdict
from erasediff.verdict.statistics import mean, share

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Images of candidates by the models before and after.

    Attributes:
        sought: Forgotten candidates that images were asked for.
        retained: Retained ones.
        others: Candidates besides that judges choose among, such as anchors.
        images: By model and label, uint8 [n, C, H, W].
    """

    sought: Sequence[Candidate]
    retained: Sequence[Candidate]
    others: Sequence[Candidate]
    images: Mapping[str, Mapping[str, Tensor]]

    def with_more(self, more: Drawn) -> Drawn:
        """These images and ``more`` of the same candidates."""
        images = {
            model: {label: torch.cat([of_one, more.images[model][label]]) for label, of_one in of_model.items()}
            for model, of_model in self.images.items()
        }
        return Drawn(self.sought, self.retained, self.others, images)

    def of(self, model: str, candidates: Sequence[Candidate]) -> Tensor:
        """All images of ``candidates``, one after the other, with three channels."""
        images = torch.cat([self.images[model][candidate.label] for candidate in candidates])
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images

    def asked(self, candidates: Sequence[Candidate]) -> list[int]:
        """Number of the candidate, among ``[*sought, *retained, *others]``, that each of these images was asked for."""
        every = [candidate.label for candidate in (*self.sought, *self.retained, *self.others)]
        return [
            every.index(candidate.label)
            for candidate in candidates
            for _ in range(len(self.images[BEFORE][candidate.label]))
        ]


def draw(
    before: ExaminedModel,
    after: ExaminedModel,
    chosen: Chosen,
    *,
    count: int,
    each: int,
    seed: int,
    progress: Callable[[int], None],
) -> Drawn:
    """Draw ``count`` images of what is sought, in all, and ``each`` of each retained candidate, by both models."""
    of_sought = -(-count // len(chosen.sought))
    sizes = [(candidate, of_sought) for candidate in chosen.sought]
    sizes += [(candidate, each) for candidate in chosen.retained]
    images = {
        name: {
            candidate.label: model.draw(candidate, size, seed, progress, prompts=chosen.prompts[candidate.label])
            for candidate, size in sizes
        }
        for name, model in ((BEFORE, before), (AFTER, after))
    }
    return Drawn(chosen.sought, chosen.retained, chosen.others, images)


@dataclass(slots=True)
class Findings:
    """Figures and rows of one judge.

    Attributes:
        figures: Figures, those that decide first.
        rows: A record for each image: judge, model, what it was asked for, what the judge sees.
        forgotten: What follows, and why where that is no success.
        retained: Likewise.
        reasons: Sentences.
    """

    figures: list[Figure] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    forgotten: Forgotten = "cannot tell"
    retained: Retained = "cannot tell"
    reasons: list[str] = field(default_factory=list)


def is_doubtful(findings: Findings) -> bool:
    """Return true where chance may explain that a limit is not met: it is within the figure's interval."""
    return any(
        figure.decides
        and figure.is_met is False
        and figure.limit is not None
        and figure.after.low <= figure.limit <= figure.after.high
        for figure in findings.figures
    )


def judge_images(judge: Judge, drawn: Drawn, settings: VerdictConfig, *, decides: bool) -> Findings:
    """What ``judge`` sees in the images of both models, and what follows from it."""
    findings = Findings()
    others = [*drawn.retained, *drawn.others]
    labels = [candidate.label for candidate in (*drawn.sought, *others)]

    def hits(model: str, candidates: Sequence[Candidate], shows: Callable[[int, int], bool]) -> list[bool]:
        answers = judge.answers(drawn.of(model, candidates), drawn.sought, others).tolist()
        asked = drawn.asked(candidates)
        for number, (wanted, answer) in enumerate(zip(asked, answers, strict=True)):
            findings.rows.append(
                {
                    "judge": judge.name,
                    "model": model,
                    "asked": labels[wanted],
                    "image": number - asked.index(wanted),
                    "sees": None if answer == UNKNOWN else labels[answer],
                }
            )
        return [shows(wanted, answer) for wanted, answer in zip(asked, answers, strict=True)]

    def shows_sought(_: int, answer: int) -> bool:
        return 0 <= answer < len(drawn.sought)

    before, after = (hits(model, drawn.sought, shows_sought) for model in (BEFORE, AFTER))
    recognised = Figure(
        key="recognised",
        title="Images asked for what is forgotten that still show it",
        judge=judge.name,
        before=share(sum(before), len(before)),
        after=share(sum(after), len(after)),
        relation="at most",
        limit=settings.forgotten_limit,
        decides=decides,
    )
    findings.figures.append(recognised)
    assert recognised.before is not None
    findings.forgotten = "forgotten" if recognised.is_met else "not forgotten"
    if recognised.before.value < settings.control_limit:
        findings.forgotten = "cannot tell"
        findings.reasons.append(
            f"The judge {judge.name} sees what is to be forgotten in {recognised.before.value:.0%} of the original "
            f"model's own images, less than {settings.control_limit:.0%}: use another one with --judge."
        )
    elif recognised.is_met and recognised.after.high > 0.5:
        findings.forgotten = "cannot tell"
        findings.reasons.append(f"{recognised.after.count} images are too few: raise verdict.images.")
    elif not recognised.is_met:
        findings.reasons.append(
            f"The judge {judge.name} still sees what is to be forgotten in {recognised.after.value:.0%} of "
            f"{recognised.after.count} images (limit {settings.forgotten_limit:.0%})."
        )
    if not judge.tells_apart:
        findings.reasons.append(f"The judge {judge.name} cannot say what retained images show.")
        return findings
    if not drawn.retained:
        findings.reasons.append("Nothing that is to be retained is named: name prompts with --retain-prompts.")
        return findings
    _judge_retained(findings, judge, drawn, settings, hits, decides=decides)
    return findings


def _judge_retained(
    findings: Findings,
    judge: Judge,
    drawn: Drawn,
    settings: VerdictConfig,
    hits: Callable[[str, Sequence[Candidate], Callable[[int, int], bool]], list[bool]],
    *,
    decides: bool,
) -> None:
    before, after = (hits(model, drawn.retained, lambda wanted, answer: wanted == answer) for model in (BEFORE, AFTER))
    differences = [float(was) - float(still) for was, still in zip(before, after, strict=True)]
    drop = Figure(
        key="retained_drop",
        title="Retained images that no longer show what they were asked for, mean drop",
        judge=judge.name,
        after=mean(differences),
        relation="at most",
        limit=settings.retained_limit,
        decides=decides,
    )
    each = len(differences) // len(drawn.retained)
    drops = [mean(differences[first : first + each]) for first in range(0, len(differences), each)]
    worst = max(range(len(drops)), key=lambda number: drops[number].value)
    worst_drop = Figure(
        key="worst_drop",
        title=f"… largest drop of one ({drawn.retained[worst].label})",
        judge=judge.name,
        after=drops[worst],
        relation="at most",
        limit=settings.worst_limit,
        # A drop of one in many that chance explains is none.
        compared="low",
        decides=decides,
    )
    still = Figure(
        key="retained",
        title="Retained images that show what they were asked for",
        judge=judge.name,
        before=share(sum(before), len(before)),
        after=share(sum(after), len(after)),
    )
    findings.figures += [drop, worst_drop, still]
    assert still.before is not None
    if still.before.value < settings.control_limit:
        findings.reasons.append(
            f"The judge {judge.name} sees what they were asked for in {still.before.value:.0%} of the original model's "
            f"retained images, less than {settings.control_limit:.0%}: use another one with --judge."
        )
        return
    findings.retained = "retained" if drop.is_met and worst_drop.is_met else "damaged"
    if findings.retained == "damaged":
        mean_points, worst_points = (100 * figure.after.value for figure in (drop, worst_drop))
        findings.reasons.append(
            f"The judge {judge.name} misses what they were asked for in {mean_points:.0f} points more of the retained "
            f"images (limit {100 * settings.retained_limit:.0f}), in {worst_points:.0f} points of "
            f'"{drawn.retained[worst].label}".'
        )


def distance_figures(
    before: ExaminedModel, after: ExaminedModel, drawn: Drawn, anchor: Candidate | None, *, seed: int
) -> list[Figure]:
    """Figures of how far predictions have moved, on the original model's images of each condition.

    In units of the distance between the original's predictions under the forgotten condition and its anchor: 0 before
    the first step, 1 for a prediction as far away as the anchor's.
    """
    if anchor is None or not anchor.condition:
        return []
    sought = drawn.sought[0]

    def samples(candidate: Candidate) -> Tensor:
        return samples_of(before.model, drawn.images[BEFORE][candidate.label][:8].expand(-1, 3, -1, -1))

    def predictions(examined: ExaminedModel, sample: Tensor, candidate: Candidate) -> Tensor:
        with examined.attached():
            return noise_predictions(examined.model, examined.model.denoiser, sample, candidate, seed=seed)

    sample = samples(sought)
    original, unit = (predictions(before, sample, candidate) for candidate in (sought, anchor))
    moved = predictions(after, sample, sought)
    figures = [
        Figure(
            key="distance_gone",
            title="Distance of forgotten predictions from the original's (anchor: 1)",
            after=mean(relative_distances(moved, original, unit)),
        ),
        Figure(
            key="distance_to_anchor",
            title="… from the original's under the anchor",
            after=mean(relative_distances(moved - unit + original, original, unit)),
        ),
    ]
    scale = (unit - original).flatten(2).square().mean((0, 2)).sqrt().mean()
    drifts = []
    for candidate in drawn.retained:
        sample = samples(candidate)
        change = predictions(after, sample, candidate) - predictions(before, sample, candidate)
        drifts += (change.flatten(2).square().mean((0, 2)).sqrt() / scale).tolist()
    if drifts:
        figures.append(
            Figure(
                key="retained_drift",
                title="… of retained predictions from the original's, in the same unit",
                after=mean(drifts),
            )
        )
    return figures


def concluded(findings: Sequence[Findings], extra: Sequence[Figure], **facts: Any) -> Verdict:
    """The verdict of the first judge; the others' figures are beside it."""
    first = findings[0]
    figures = [figure for found in findings for figure in found.figures]
    return Verdict(
        forgotten=first.forgotten,
        retained=first.retained,
        reasons=first.reasons,
        figures=[*figures, *extra],
        **facts,
    )
