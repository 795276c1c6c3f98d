"""A copy counts as one, another image of the same kind does not, and the limit is each image's own."""

import pytest
import torch

from erasediff.data import load_digits
from erasediff.evaluation.memorization import isolation, nearest, reproduces


@pytest.fixture(scope="module")
def train() -> torch.Tensor:
    return load_digits().train.sample.unique(dim=0)


@pytest.fixture(scope="module")
def test() -> torch.Tensor:
    return load_digits().test.sample


def test_nearest_is_that_of_all_pairs(train: torch.Tensor, test: torch.Tensor) -> None:
    queries = test[:230]
    distance, index = nearest(queries, train)
    for i in (0, 99, 100, 229):
        all_of_them = (train - queries[i]).flatten(1).double().norm(dim=1)
        assert index[i] == all_of_them.argmin()
        assert distance[i].item() == pytest.approx(all_of_them.min().item(), rel=1e-4)


def test_isolation_leaves_the_image_itself_out(train: torch.Tensor) -> None:
    for i in (0, 500):
        others = torch.cat((train[:i], train[i + 1 :]))
        expected = (others - train[i]).flatten(1).double().norm(dim=1).min().item()
        assert isolation(torch.tensor([i]), train).item() == pytest.approx(expected, rel=1e-4)


def test_a_noisy_copy_is_a_reproduction_and_unseen_images_are_not(train: torch.Tensor, test: torch.Tensor) -> None:
    index = torch.arange(0, 1000, 10)
    noise = torch.randn(train[index].shape, generator=torch.Generator().manual_seed(0))
    limit = isolation(index, train)
    small = noise * (0.3 * limit / noise.flatten(1).norm(dim=1))[:, None, None, None]
    assert reproduces([train[index] + small], [train], index).all()
    large = noise * (1.1 * limit / noise.flatten(1).norm(dim=1))[:, None, None, None]
    assert not reproduces([train[index] + large], [train], index).any()
    assert not reproduces([train[index]], [train], index + 1).any()
    _, closest = nearest(test, train)
    # Digits are alike: an unseen one is now and then nearer to its neighbour than that is to any other.
    assert reproduces([test], [train], closest).double().mean() < 0.5


def test_every_view_must_agree(train: torch.Tensor) -> None:
    index = torch.tensor([3, 4])
    features = train.flatten(1)
    assert reproduces([train[index], features[index]], [train, features], index).all()
    assert not reproduces([train[index], features[index.flip(0)]], [train, features], index).any()
    with pytest.raises(ValueError, match="view"):
        reproduces([train], [], index)
