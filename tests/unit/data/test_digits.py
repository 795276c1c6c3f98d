"""The demo's data: real, scaled, and split the same way every time."""

import torch

from erasediff.data import load_digits


def test_digits_are_scaled_images_of_ten_classes() -> None:
    digits = load_digits()
    assert digits.train.sample.shape[1:] == (1, 8, 8)
    assert digits.train.sample.dtype == torch.float32
    assert digits.train.sample.min() == -1
    assert digits.train.sample.max() == 1
    assert digits.num_classes == 10


def test_the_held_out_images_are_no_training_images_and_cover_each_class_alike() -> None:
    digits = load_digits()
    assert not set(digits.train.ids.tolist()) & set(digits.test.ids.tolist())
    assert len(digits.train) + len(digits.test) == 1797
    held_out = digits.test.class_labels.bincount() / (
        digits.test.class_labels.bincount() + digits.train.class_labels.bincount()
    )
    assert ((held_out - 0.2).abs() < 0.01).all()


def test_the_split_is_always_the_same() -> None:
    assert torch.equal(load_digits().test.ids, load_digits().test.ids)
