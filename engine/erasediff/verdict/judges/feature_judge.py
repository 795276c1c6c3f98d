"""Judge of models without conditions: a classifier of the run's images on features of the original denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erasediff.verdict.judges.base import UNKNOWN, Candidate

ACCEPTED_SHARE = 0.995
REGULARISATION = 10.0


class FeatureJudge:
    """Support vector machine on features of images, with a reject option.

    It needs nothing but the original model and images of each class. An image whose features are farther from those of
    the nearest image that it was fitted to than all but one in 200 of these are from theirs is ``UNKNOWN``.

    Args:
        features: Function from images uint8 [N, 3, H, W] to features float32 [N, D].
        images: uint8 [N, 3, H, W], real ones.
        classes: int64 [N], the class of each.
        names: Names of the classes.
        denoiser_sha256: Of the network that the features are of.
    """

    name = "features"
    tells_apart = True

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        images: Tensor,
        classes: Tensor,
        names: Sequence[str],
        denoiser_sha256: str,
    ) -> None:
        from sklearn.neighbors import NearestNeighbors
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        self.features, self.names, self.denoiser_sha256 = features, tuple(names), denoiser_sha256
        known = features(images).numpy().astype(np.float64)
        self._scaler = StandardScaler().fit(known)
        known = self._scaler.transform(known)
        self._machine = SVC(C=REGULARISATION, gamma="scale").fit(known, classes.numpy())
        self._neighbours = NearestNeighbors(n_neighbors=1).fit(known)
        distances, _ = self._neighbours.kneighbors()  # without an argument: each image's nearest other
        self._reach = float(np.quantile(distances, ACCEPTED_SHARE))
        self._count = len(images)

    @property
    def description(self) -> Mapping[str, Any]:
        return {
            "kind": "support vector machine on activations in the middle of the original denoiser (arXiv 2303.09769)",
            "denoiser_sha256": self.denoiser_sha256,
            "classes": list(self.names),
            "images": self._count,
            "reach": self._reach,
        }

    def answers(self, images: Tensor, sought: Sequence[Candidate], others: Sequence[Candidate]) -> Tensor:
        """See ``Judge``; candidates are classes by their labels, and an image of another class is ``UNKNOWN``.

        Raises:
            ValueError: A candidate is no class of the judge.
        """
        if not len(images):
            return torch.empty(0, dtype=torch.int64)
        labels = [candidate.label for candidate in (*sought, *others)]
        if unknown := set(labels) - set(self.names):
            raise ValueError(f"the judge has no classes {sorted(unknown)}")
        by_class = torch.tensor([labels.index(name) if name in labels else UNKNOWN for name in self.names])
        found = self._scaler.transform(self.features(images).numpy().astype(np.float64))
        distances, _ = self._neighbours.kneighbors(found)
        answers = by_class[torch.from_numpy(self._machine.predict(found).astype(np.int64))]
        return torch.where(torch.from_numpy(distances[:, 0] <= self._reach), answers, UNKNOWN)
