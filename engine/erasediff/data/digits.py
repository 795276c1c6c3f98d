"""Handwritten digits: real data that comes with a dependency, small enough to train on in a minute."""

import numpy as np
import torch

from erasediff.data.images import ClassDataset, Images

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
