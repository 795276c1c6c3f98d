"""Classifier of real images with a reject option, which measures what generated images show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erasediff.data import ClassDataset
from erasediff.evaluation.distances import squared_discrepancy

if TYPE_CHECKING:
    # Half a second to import, of which ranks that train need nothing.
    from sklearn.neighbors import NearestNeighbors
    from sklearn.svm import SVC

NONE = -1
"""Class of an image that resembles no real one."""

GAMMA = 0.064  # exp(-GAMMA |x - y|^2) on pixels in [-1, 1]; 0.001 on grey values 0 .. 16, scikit-learn's own example
GAMMA_PIXELS = 64  # of these images; the kernel's width is that of a mean over pixels
REGULARISATION = 10.0
ACCEPTED_SHARE = 0.995


@dataclass(frozen=True, slots=True)
class Judge:
    """Support vector machine on pixels, fitted to the training images of a data set.

    A support vector machine gives every image a class: pure noise is a "1" to it, nineteen times in twenty. So an
    image farther from its nearest training image than all but one in 200 training images are from theirs is NONE.

    Attributes:
        machine: Support vector machine of scikit-learn, on pixels.
        neighbours: The training images.
        reach: Largest distance of an image with a class from the nearest of them.
        accuracy: Share of the held-out images that are classified correctly, NONE counting as wrong.
        rejected: Share of the held-out images that are NONE.
        gamma: Of the kernel exp(-gamma |x - y|^2).
    """

    machine: SVC
    neighbours: NearestNeighbors
    reach: float
    accuracy: float
    rejected: float
    gamma: float = GAMMA

    @classmethod
    def fit(cls, dataset: ClassDataset) -> Judge:
        """Fit a classifier to ``dataset``; deterministic, a fraction of a second for the digits."""
        from sklearn.neighbors import NearestNeighbors
        from sklearn.svm import SVC

        train, labels = _pixels(dataset.train.sample), dataset.train.class_labels.cpu().numpy()
        gamma = GAMMA * GAMMA_PIXELS / train.shape[1]
        machine = SVC(C=REGULARISATION, gamma=gamma).fit(train, labels)
        neighbours = NearestNeighbors(n_neighbors=1).fit(train)
        distances, _ = neighbours.kneighbors()  # without an argument: each image's nearest other
        untested = cls(machine, neighbours, float(np.quantile(distances, ACCEPTED_SHARE)), accuracy=0.0, rejected=0.0)
        answers = untested.classify(dataset.test.sample)
        right = answers == dataset.test.class_labels.cpu()
        return cls(
            machine,
            neighbours,
            untested.reach,
            accuracy=right.double().mean().item(),
            rejected=(answers == NONE).double().mean().item(),
            gamma=gamma,
        )

    def classify(self, sample: Tensor) -> Tensor:
        """Classify images [N, C, H, W] with the reject option: int64 [N], ``NONE`` for images like no real one."""
        return torch.where(self.resembles(sample), self.nearest_class(sample), NONE)

    def nearest_class(self, sample: Tensor) -> Tensor:
        """Classify images [N, C, H, W] without the reject option: int64 [N]."""
        if len(sample) == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.from_numpy(self.machine.predict(_pixels(sample)).astype(np.int64))

    def resembles(self, sample: Tensor) -> Tensor:
        """Mask bool [N] of the images that are near enough to a real one to have a class."""
        if len(sample) == 0:
            return torch.empty(0, dtype=torch.bool)
        distances, _ = self.neighbours.kneighbors(_pixels(sample))
        return torch.from_numpy(distances[:, 0] <= self.reach)

    def discrepancy(self, sample: Tensor, reference: Tensor) -> float:
        """Squared maximum mean discrepancy between two sets of images [N, C, H, W]; 0 for equal distributions.

        The unbiased estimate (Gretton et al. 2012, eq. 3) in the classifier's own kernel: what the Kernel Inception
        Distance is to Inception's features. At least two images on each side, or nan.
        """
        from sklearn.metrics.pairwise import rbf_kernel

        x, y = _pixels(sample), _pixels(reference)
        if min(len(x), len(y)) < 2:
            return float("nan")
        return squared_discrepancy(*(rbf_kernel(a, b, self.gamma) for a, b in ((x, x), (y, y), (x, y))))


def _pixels(sample: Tensor) -> NDArray[np.float64]:
    return sample.detach().flatten(1).cpu().double().numpy()
