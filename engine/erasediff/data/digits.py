"""Handwritten digits of scikit-learn as labelled image tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Images:
    """Labelled images in memory.

    Attributes:
        sample: [N, C, H, W] float32 in [-1, 1].
        class_labels: [N] int64.
        ids: [N] int64, each image's number in its data set.

    Raises:
        ValueError: for other shapes.
    """

    sample: Tensor
    class_labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        if self.sample.ndim != 4 or not len(self.sample) == len(self.class_labels) == len(self.ids):
            raise ValueError(
                "Images takes sample [N, C, H, W], class_labels [N] and ids [N], got "
                f"{tuple(self.sample.shape)}, {tuple(self.class_labels.shape)}, {tuple(self.ids.shape)}"
            )

    def __len__(self) -> int:
        return len(self.sample)

    def of_classes(self, classes: list[int]) -> Images:
        """The images of these classes, in their order here."""
        mask = torch.isin(self.class_labels, torch.tensor(classes, device=self.class_labels.device))
        return Images(self.sample[mask], self.class_labels[mask], self.ids[mask])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.sample.to(device), self.class_labels.to(device), self.ids.to(device))


@dataclass(frozen=True, slots=True)
class ClassDataset:
    """Labelled data set.

    Attributes:
        train: Images to train on.
        test: Images held out of every training, that of the classifier included.
        class_names: Names of the classes 0, 1, ...
    """

    train: Images
    test: Images
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


TEST_SHARE = 0.2
SPLIT_SEED = 0


def load_digits() -> ClassDataset:
    """The 1,797 digits of 8 x 8 pixels in scikit-learn (Alpaydin & Kaynak, UCI 1998), one fifth held out.

    The grey values 0 .. 16 become [-1, 1]. The split is stratified by class and always the same.
    """
    # Half a second, of which runs of text-to-image models need nothing.
    import sklearn.datasets
    from sklearn.model_selection import train_test_split

    digits = sklearn.datasets.load_digits()
    sample = torch.from_numpy(digits.images.astype(np.float32) / 8 - 1)[:, None]
    class_labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(sample)), test_size=TEST_SHARE, stratify=digits.target, random_state=SPLIT_SEED
    )

    def images(ids: np.ndarray) -> Images:
        index = torch.from_numpy(np.sort(ids))
        return Images(sample[index], class_labels[index], index)

    return ClassDataset(images(train), images(test), class_names=tuple(str(digit) for digit in range(10)))
