"""The judge of unconditional models tells digits from each other, and noise from digits."""

import pytest
import torch
from torch import Tensor

from erasediff.data import ClassDataset, load_digits
from erasediff.verdict.judges.base import UNKNOWN, Candidate
from erasediff.verdict.judges.feature_judge import FeatureJudge

CANDIDATES = [Candidate(str(number), str(number)) for number in range(10)]


def pixels(images: Tensor) -> Tensor:
    return images.float().flatten(1)


def as_images(sample: Tensor) -> Tensor:
    return ((sample + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


@pytest.fixture(scope="module")
def digits() -> ClassDataset:
    return load_digits()


@pytest.fixture(scope="module")
def judge(digits: ClassDataset) -> FeatureJudge:
    names = [candidate.label for candidate in CANDIDATES]
    return FeatureJudge(pixels, as_images(digits.train.sample), digits.train.class_labels, names, "0")


def test_held_out_digits_are_recognised(judge: FeatureJudge, digits: ClassDataset) -> None:
    answers = judge.answers(as_images(digits.test.sample), CANDIDATES[:1], CANDIDATES[1:])
    assert (answers == digits.test.class_labels).double().mean() > 0.95


def test_answers_are_indices_of_the_candidates(judge: FeatureJudge, digits: ClassDataset) -> None:
    images = as_images(digits.test.of_classes([7]).sample)
    seen = judge.answers(images, [CANDIDATES[7]], CANDIDATES[:7])
    assert (seen == 0).double().mean() > 0.9
    # A class that is no candidate.
    assert (judge.answers(images, [CANDIDATES[3]], CANDIDATES[:2]) == UNKNOWN).double().mean() > 0.9
    assert judge.answers(images[:0], CANDIDATES[:1], CANDIDATES[1:]).tolist() == []
    with pytest.raises(ValueError, match="no classes"):
        judge.answers(images, [Candidate("coat", "coat")], CANDIDATES)


def test_noise_is_nothing(judge: FeatureJudge) -> None:
    noise = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert (judge.answers(noise, CANDIDATES[:1], CANDIDATES[1:]) == UNKNOWN).all()
