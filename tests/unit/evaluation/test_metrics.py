"""Rates, shares and drops against values worked out by hand, on real digits of known classes."""

import pytest
import torch

from erasediff.data import ClassDataset, load_digits
from erasediff.evaluation import Judge, conditional_metrics, evaluation_labels, unconditional_metrics


@pytest.fixture(scope="module")
def digits() -> ClassDataset:
    return load_digits()


@pytest.fixture(scope="module")
def judge(digits: ClassDataset) -> Judge:
    return Judge.fit(digits)


def pictures(digits: ClassDataset, classes: list[int]) -> torch.Tensor:
    """Training images, which the judge knows, of the given classes in turn."""
    return torch.stack([digits.train.of_classes([c]).sample[i % 100] for i, c in enumerate(classes)])


def test_rates_per_class(judge: Judge, digits: ClassDataset) -> None:
    labels = evaluation_labels(10, (3,), per_class=4, forgotten=20)
    assert len(labels) == 9 * 4 + 20
    shown = labels.clone()
    shown[labels == 3] = torch.tensor([8] * 19 + [3])  # one of twenty is still a 3
    shown[(labels == 7).nonzero()[0]] = 3  # and a 3 turns up where a 7 was asked for
    sample = pictures(digits, shown.tolist())
    metrics = conditional_metrics(judge, sample, labels, digits.train, (3,))
    assert metrics.recognised[3] == metrics.forgotten_rate == metrics.forgotten_nearest == 0.05
    assert metrics.forgotten_bound == pytest.approx(0.2361, abs=1e-4)  # Wilson's 95% bound of 1 in 20
    assert metrics.forgotten_elsewhere == pytest.approx(1 / 36)
    assert metrics.recognised[7] == metrics.retained_worst == 0.75
    assert metrics.retained_mean == pytest.approx((8 + 0.75) / 9)
    assert metrics.asked == tuple(20 if c == 3 else 4 for c in range(10))


def test_noise_is_forgetting_but_told_apart(judge: Judge, digits: ClassDataset) -> None:
    labels = evaluation_labels(10, (1,), per_class=2, forgotten=50)
    sample = pictures(digits, labels.tolist())
    sample[labels == 1] = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    metrics = conditional_metrics(judge, sample, labels, digits.train, (1,))
    assert metrics.forgotten_rate == 0
    assert metrics.forgotten_none == 1
    assert metrics.forgotten_nearest > 0.8


def test_worst_drop_is_over_retained_classes_only(judge: Judge, digits: ClassDataset) -> None:
    labels = evaluation_labels(10, (3,), per_class=4, forgotten=4)
    base = conditional_metrics(judge, pictures(digits, labels.tolist()), labels, digits.train, (3,))
    shown = labels.clone()
    shown[labels == 3] = 8
    shown[(labels == 5).nonzero()[0]] = 6
    unlearned = conditional_metrics(judge, pictures(digits, shown.tolist()), labels, digits.train, (3,))
    assert unlearned.worst_drop(base) == 0.25
    assert base.worst_drop(base) == 0


def test_unconditional_shares_and_what_remains(judge: Judge, digits: ClassDataset) -> None:
    even = unconditional_metrics(judge, pictures(digits, list(range(10)) * 4), digits.train, (3,))
    assert even.shares == (0.1,) * 10
    assert even.proportions == pytest.approx([0 if c == 3 else 1 / 9 for c in range(10)])
    forgot = unconditional_metrics(
        judge, pictures(digits, [c for c in range(10) if c != 3] * 4 + [3, 0, 0, 0]), digits.train, (3,)
    )
    assert forgot.remaining(even) == pytest.approx((1 / 40) / 0.1)
    assert forgot.largest_shift(even) == pytest.approx(7 / 39 - 1 / 9)
    assert forgot.count == 40
