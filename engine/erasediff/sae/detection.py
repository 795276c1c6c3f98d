"""How well an assigned latent tells its concept from the others, and where its threshold lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasediff.sae.activations import ActivationCache
from erasediff.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True, slots=True)
class Thresholds:
    """float32 [bins, concepts] on preactivations: of one patch, and of the mean over an image's patches.

    Ours. The published threshold, the mean over concepts of mu, is one of activations after TopK: with a k of half the
    width of the block it lies where most patches of any concept are, and a latent rarely among the k has one near 0.
    """

    patch: Tensor
    image: Tensor


@dataclass(frozen=True, slots=True)
class Detection:
    """Of patches or of images, float32 [bins, concepts] each, at the calibrated threshold.

    recall:          the share of the concept's that are detected
    false_positives: the share of all others' that are
    auc:             the probability that one of the concept scores higher than another's, whatever the threshold
    """

    recall: Tensor
    false_positives: Tensor
    auc: Tensor

    def of(self, concept: int) -> dict[str, Any]:
        """Means over timesteps."""
        return {
            "recall": self.recall[:, concept].mean().item(),
            "false_positives": self.false_positives[:, concept].mean().item(),
            "auc": self.auc[:, concept].mean().item(),
        }


@torch.no_grad()
def calibrate(
    autoencoder: SparseAutoencoder,
    assigned: Tensor,
    cache: ActivationCache,
    timesteps: Tensor,
    most_false_positives: float = 1.0,
) -> tuple[Thresholds, Detection, Detection]:
    """(thresholds, detection of patches, detection of images) on a cache, which should be one not trained on.

    ``assigned`` int64 [concepts]; ``timesteps`` int64 [bins] are the cache's. Of the thresholds that are exceeded by no
    more than the share ``most_false_positives`` of other concepts' patches, or images, each has the largest recall less
    false positives (Youden's J) at its timestep. Images of a concept under the prompt of another are neither.
    """
    scores, concept, drawn = _scores(autoencoder, assigned, cache, timesteps)
    patch, image = torch.empty(2, 4, len(timesteps), len(assigned))
    for number in range(len(assigned)):
        asked = (concept == number) | (drawn != number)
        positive = concept[asked] == number
        for place in range(len(timesteps)):
            own = scores[asked, place, :, number]
            patch[:, place, number] = _best_cut(
                own.reshape(-1), positive.repeat_interleave(own.shape[1]), most_false_positives
            )
            image[:, place, number] = _best_cut(own.mean(dim=1), positive, most_false_positives)
    return Thresholds(patch[0], image[0]), Detection(*patch[1:]), Detection(*image[1:])


def _scores(
    autoencoder: SparseAutoencoder, assigned: Tensor, cache: ActivationCache, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(preactivations float32 [images, bins, patches, concepts], each image's concept and what it was drawn of)."""
    device = autoencoder.W_enc.device
    rows, bias = autoencoder.W_enc[assigned.to(device)], autoencoder.b_enc[assigned.to(device)]
    scores, concepts, drawn = [], [], []
    for shard in range(len(cache.shards)):
        x, concept, steps, own = cache.images(shard)
        # A sampler of second order sees a timestep twice: the first time counts.
        place = (steps == timesteps[:, None]).int().argmax(dim=1)
        part = (x[:, place].float().to(device) - autoencoder.b_dec) @ rows.T + bias
        scores.append(part.cpu())
        concepts.append(concept)
        drawn.append(own)
    return torch.cat(scores), torch.cat(concepts), torch.cat(drawn)


def _best_cut(score: Tensor, positive: Tensor, most_false_positives: float) -> Tensor:
    """[threshold, recall, rate of false positives, AUC] of scores [N]; infinity where no cut is better than none."""
    ordered, order = score.sort(descending=True, stable=True)
    right = positive[order].double()
    # A cut behind each score that differs from the next one, and the two ends.
    cuts = torch.nonzero(ordered[:-1] > ordered[1:])[:, 0]
    recall, false = (
        torch.cat([some.new_zeros(1), (some.cumsum(0) / some.sum())[cuts], some.new_ones(1)])
        for some in (right, 1 - right)
    )
    auc = torch.trapezoid(recall, false).item()
    best = int(torch.where(false <= most_false_positives, recall - false, -1.0).argmax())
    if best in (0, len(cuts) + 1):
        return torch.tensor([torch.inf, 0.0, 0.0, auc])
    threshold = ordered[cuts[best - 1] : cuts[best - 1] + 2].mean().item()
    return torch.tensor([threshold, recall[best].item(), false[best].item(), auc])
