"""Membership statistics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from erasediff.audit.membership_statistics import auc_estimate, dataset_inference, tpr_at_fpr


def test_auc_has_the_interval_of_hanley_and_mcneil() -> None:
    members, others = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.5, 3.5, 4.5, 5.5])
    estimate = auc_estimate(members, others)
    # 13 of 16 pairs; the variance is worked out by hand from their equation 2.
    auc = 13 / 16
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    deviation = ((auc * (1 - auc) + 3 * (q1 - auc**2) + 3 * (q2 - auc**2)) / 16) ** 0.5
    assert estimate.value == auc
    assert estimate.low == pytest.approx(auc - 1.959964 * deviation, abs=1e-6)
    assert estimate.high == 1


def test_the_interval_covers_the_auc_of_two_normal_distributions() -> None:
    # P(X < Y) = Phi(d / sqrt 2) for unit normals whose means are d apart; d = 1.
    truth, covered = 0.7602, 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        estimate = auc_estimate(torch.randn(60, generator=generator), torch.randn(60, generator=generator) + 1)
        covered += estimate.low <= truth <= estimate.high
    assert 180 <= covered <= 198


def test_tpr_counts_members_below_all_but_a_share_of_others() -> None:
    others = torch.arange(200).float()
    members = torch.tensor([-1.0, 0.5, 1.5, 2.5])
    # Two of 200 may be below the threshold: it is 2.
    assert tpr_at_fpr(members, others).value == 0.75
    assert tpr_at_fpr(members, others[:50]).value == 0.25, "with 50 others, below all of them"


def test_dataset_inference_tells_members_from_others() -> None:
    generator = np.random.default_rng(0)
    members, others = generator.normal(0, 1, (80, 5)), generator.normal(0, 1, (80, 5))
    assert dataset_inference(members - 1, others, repeats=20) < 1e-4
    same = [
        dataset_inference(generator.normal(0, 1, (40, 5)), generator.normal(0, 1, (40, 5)), repeats=10, seed=seed)
        for seed in range(10)
    ]
    assert 0.35 < np.mean(same) < 0.65
    with pytest.raises(ValueError, match="4 images of each"):
        dataset_inference(members[:3], others)
