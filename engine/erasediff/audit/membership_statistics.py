"""Statistics of membership inference: AUC with its interval, TPR at a low FPR, and dataset inference (CDI)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from erasediff.evaluation.memorization import membership_auc
from erasediff.verdict.statistics import Z95, Estimate, share

Features = NDArray[np.float64]


def auc_estimate(members: Tensor, others: Tensor) -> Estimate:
    """AUC of losses of members [M] and non-members [N], with the interval of Hanley & McNeil (1982)."""
    auc, m, n = membership_auc(members, others), len(members), len(others)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (m - 1) * (q1 - auc**2) + (n - 1) * (q2 - auc**2)) / (m * n)
    half = Z95 * math.sqrt(max(variance, 0.0))
    return Estimate(auc, max(auc - half, 0.0), min(auc + half, 1.0), m + n)


def tpr_at_fpr(members: Tensor, others: Tensor, fpr: float = 0.01) -> Estimate:
    """Share of members [M] whose loss is below that of all but a share ``fpr`` of non-members [N] (LiRA, 2022).

    With fewer than 1 / ``fpr`` non-members, it is the share below all of them.
    """
    allowed = math.floor(fpr * len(others))
    threshold = others.sort().values[allowed]
    return share(int((members < threshold).sum()), len(members))


def dataset_inference(members: Features, others: Features, *, repeats: int = 100, seed: int = 0) -> float:
    """p-value of CDI (Dubinski et al. 2025, arXiv 2411.12858): were the members trained on?

    In each of ``repeats`` random splits a logistic regression is fitted to one half of both sets' features; Welch's
    t-test asks whether it scores the members of the other half higher than its non-members. The mean p-value is
    returned: near 0 for images that the model was trained on, near 0.5 for others.

    Args:
        members: [M, D] features of the images in question, M at least 4.
        others: [N, D] of images of the same kind that were never trained on, N at least 4.
        repeats: Number of splits.
        seed: Seed of the splits.

    Raises:
        ValueError: There are fewer images.
    """
    from scipy.stats import ttest_ind
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(len(members), len(others)) < 4:
        raise ValueError(f"dataset inference needs 4 images of each set, got {len(members)} and {len(others)}")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(repeats):
        fitted, tested = zip(*(_halves(features, generator) for features in (members, others)), strict=True)
        labels = np.repeat([1, 0], [len(part) for part in fitted])
        scorer = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(np.concatenate(fitted), labels)
        published, unseen = (scorer.decision_function(part) for part in tested)
        p_value = float(ttest_ind(published, unseen, equal_var=False, alternative="greater").pvalue)
        # All scores equal: nothing tells them apart.
        values.append(0.5 if math.isnan(p_value) else p_value)
    return math.fsum(values) / repeats


def _halves(features: Features, generator: np.random.Generator) -> tuple[Features, Features]:
    order = generator.permutation(len(features))
    return features[order[: len(order) // 2]], features[order[len(order) // 2 :]]
