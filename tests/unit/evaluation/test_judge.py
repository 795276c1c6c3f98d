"""The classifier recognises real digits, and rejects noise."""

import pytest
import torch

from erasediff.data import ClassDataset, load_digits
from erasediff.evaluation import NONE, Judge


@pytest.fixture(scope="module")
def digits() -> ClassDataset:
    return load_digits()


@pytest.fixture(scope="module")
def judge(digits: ClassDataset) -> Judge:
    return Judge.fit(digits)


def test_held_out_digits_are_recognised(judge: Judge, digits: ClassDataset) -> None:
    right = judge.classify(digits.test.sample) == digits.test.class_labels
    assert judge.accuracy == right.double().mean()
    assert judge.accuracy > 0.98
    assert judge.rejected < 0.01


@pytest.mark.parametrize(
    "garbage",
    [
        torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1),
        torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        torch.full((1, 1, 8, 8), -1.0),
        torch.full((1, 1, 8, 8), 1.0),
        torch.zeros(1, 1, 8, 8),
    ],
    ids=["normal noise", "uniform noise", "empty", "full", "grey"],
)
def test_garbage_is_none_of_the_digits(judge: Judge, garbage: torch.Tensor) -> None:
    assert (judge.classify(garbage) == NONE).all()


def test_without_that_answer_noise_would_pass_for_one_digit(judge: Judge) -> None:
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert judge.nearest_class(noise).bincount().max() > 400


def test_discrepancy_is_near_zero_for_real_images_and_grows_with_damage(judge: Judge, digits: ClassDataset) -> None:
    real, held_out = digits.train.sample, digits.test.sample
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    discrepancies = [judge.discrepancy((held_out + scale * noise).clamp(-1, 1), real) for scale in (0, 0.2, 0.5, 1)]
    assert abs(discrepancies[0]) < 0.002
    assert discrepancies == sorted(discrepancies)
    one_class = digits.train.of_classes([3]).sample
    assert judge.discrepancy(one_class, real) > 0.05


def test_nothing_to_judge_is_no_error(judge: Judge) -> None:
    assert judge.classify(torch.empty(0, 1, 8, 8)).shape == (0,)
