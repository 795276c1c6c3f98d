"""Battery: membership inference by denoising losses, against images that were never seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from erasediff.audit.batteries.base import Battery, Piece
from erasediff.audit.battery_outcome import Figure, Row, Rows, where
from erasediff.audit.context import FORGOTTEN, UNSEEN
from erasediff.audit.membership_statistics import auc_estimate, dataset_inference, tpr_at_fpr
from erasediff.audit.subject import Subject
from erasediff.config.fields import Count, Section
from erasediff.evaluation.memorization import draw_losses
from erasediff.verdict.statistics import Estimate

LEAST = 4


class MembershipSettings(Section):
    """Settings of the losses.

    Attributes:
        draws: Timesteps per image.
        images: Images of each set, at most.
        repeats: Splits that the p-value is the mean over.
    """

    draws: Count = 20
    images: Count = 500
    repeats: Count = 100


class Membership(Battery[MembershipSettings]):
    """AUC, TPR at 1% FPR and CDI's p-value of the images to forget against unseen ones."""

    name = "membership"
    order = 10
    title = "Membership inference"
    source = (
        "losses: Yeom et al. 2018, Carlini et al. 2023; TPR at 1% FPR: Carlini et al. 2022; CDI: Dubinski et al. 2025 "
        "(arXiv 2411.12858) on the losses of all timesteps"
    )
    settings_class = MembershipSettings
    quick: ClassVar = {"draws": 8, "images": 64}
    is_judged = False

    def unfit(self) -> str | None:
        if len(self.audit.pictures_of(UNSEEN)) < LEAST:
            return f"it needs {LEAST} images that no model was trained on: give --unseen"
        if len(self.audit.pictures_of(FORGOTTEN)) < LEAST:
            return f"it needs {LEAST} images to forget: give --data"
        return None

    @property
    def subjects(self) -> Sequence[str]:
        return list(self.audit.subjects)

    def _count(self, name: str) -> int:
        return min(len(self.audit.pictures_of(name)), self.settings.images)

    def passes(self) -> float:
        return self.settings.draws * (self._count(FORGOTTEN) + self._count(UNSEEN))

    def pieces(self) -> Sequence[Piece]:
        size = self.audit.model.settings.batch_size
        return [
            {"set": name, "first": first} for name in (FORGOTTEN, UNSEEN) for first in range(0, self._count(name), size)
        ]

    def measure(self, subject: Subject, piece: Piece) -> list[Row]:
        pictures, first = self.audit.pictures_of(piece["set"]), piece["first"]
        last = min(first + self.audit.model.settings.batch_size, self._count(piece["set"]))
        samples = subject.encode(pictures.pixels[first:last])
        ids = torch.arange(first, last, device=samples.device)
        batch = {"sample": samples, "sample_ids": ids, **subject.condition(pictures.asks[first:last])}
        losses = draw_losses(
            subject.model.denoiser,
            batch,
            process=subject.process,
            denoiser=subject.model.predict,
            draws=self.settings.draws,
            # One seed for all: images of both sets meet the same noise at the same timesteps.
            seed=self.audit.seed,
        )
        table = torch.stack(list(losses), 1).cpu()
        return [
            {**piece, "image": name, "losses": row}
            for name, row in zip(pictures.names[first:last], table.tolist(), strict=True)
        ]

    def figures(self, rows: Rows) -> list[Figure]:
        tables = {
            name: {
                subject: torch.tensor([row["losses"] for row in own], dtype=torch.float64)
                for subject, own in where(rows, set=name).items()
            }
            for name in (FORGOTTEN, UNSEEN)
        }
        pairs = {subject: (tables[FORGOTTEN][subject], tables[UNSEEN][subject]) for subject in rows}
        means = {subject: (ours.mean(1), others.mean(1)) for subject, (ours, others) in pairs.items()}
        return [
            Figure(
                name="AUC of the losses",
                values={subject: auc_estimate(*pair) for subject, pair in means.items()},
                note="0.5 is chance.",
            ),
            Figure(
                name="TPR at 1% FPR",
                values={subject: tpr_at_fpr(*pair) for subject, pair in means.items()},
                kind="share",
                note="1% is chance.",
            ),
            Figure(
                name="CDI's p-value",
                values={
                    subject: _p_value(
                        dataset_inference(
                            np.asarray(ours), np.asarray(others), repeats=self.settings.repeats, seed=self.audit.seed
                        ),
                        len(ours) + len(others),
                    )
                    for subject, (ours, others) in pairs.items()
                },
                note="Near 0: the model was trained on these images. A mean over random splits; it has no interval.",
            ),
        ]


def _p_value(value: float, count: int) -> Estimate:
    return Estimate(value, value, value, count)
