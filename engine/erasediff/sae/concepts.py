"""Assignment of latents to concepts: mean activations over concepts and timesteps, and scores from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.sae.activations import ActivationCache
from erasediff.sae.autoencoder import SparseAutoencoder

DELTA = 1e-8
BATCH = 8192


@dataclass(frozen=True, slots=True)
class Features:
    """``mean`` float32 [bins, concepts, n]: mu(i, t, c), the mean activation of latent i over the patches of concept c.

    ``timesteps`` int64 [bins] are the timesteps that were seen, ascending. A sampler with other ones is served by the
    nearest, so no scheduler or number of steps has to be kept to.
    """

    mean: Tensor
    timesteps: Tensor

    def scores(self) -> Tensor:
        """[bins, concepts, n]: the latent's share of concept c's activation less its share of all others'.

        score(i, t, c) = mu(i, t, c) / (sum_j mu(j, t, c) + d) - mu(i, t, ~c) / (sum_j mu(j, t, ~c) + d), d = 1e-8
        (SAeUron, 2501.18052, section 4); ~c is the mean of the other concepts. ValueError for a single concept.
        """
        concepts = self.mean.shape[1]
        if concepts < 2:
            raise ValueError("a score compares concepts: give at least two")
        others = (self.mean.sum(dim=1, keepdim=True) - self.mean) / (concepts - 1)
        share, share_of_others = (mu / (mu.sum(dim=2, keepdim=True) + DELTA) for mu in (self.mean, others))
        return share - share_of_others


@torch.no_grad()
def measure_features(autoencoder: SparseAutoencoder, cache: ActivationCache, concepts: int) -> Features:
    """mu(i, t, c) over the whole cache, summed in fp64; one shard in memory at a time."""
    device = autoencoder.W_enc.device
    timesteps = torch.unique(
        torch.cat([torch.unique(cache.read(shard).timestep) for shard in range(len(cache.shards))])
    )
    groups, latents = len(timesteps) * concepts, autoencoder.latents
    total = torch.zeros(groups * latents, dtype=torch.float64, device=device)
    count = torch.zeros(groups, dtype=torch.float64, device=device)
    for shard in range(len(cache.shards)):
        patches = cache.read(shard)
        group = torch.searchsorted(timesteps, patches.timestep) * concepts + patches.concept
        for x, where in zip(torch.split(patches.x, BATCH), torch.split(group, BATCH), strict=True):
            code, where = autoencoder.encode(x.to(device)), where.to(device)
            flat = where[:, None] * latents + code.indices
            total.index_add_(0, flat.reshape(-1), code.values.double().reshape(-1))
            count.index_add_(0, where, torch.ones_like(where, dtype=torch.float64))
    mean = total.view(groups, latents) / count.clamp_min(1)[:, None]
    return Features(mean.float().view(len(timesteps), concepts, latents).cpu(), timesteps)


def assign_latents(features: Features) -> Tensor:
    """One latent for each concept, int64 [concepts], none twice: the best scores over all timesteps choose first.

    As i_c = argmax_i score(i, c) in SAEmnesia (2509.21379), where uniqueness is asked for but not how it is kept.
    """
    scores = features.scores().mean(dim=0)
    assigned = torch.full((scores.shape[0],), -1)
    for _ in range(len(assigned)):
        best = int(scores.argmax())
        concept, latent = divmod(best, scores.shape[1])
        assigned[concept] = latent
        scores[concept] = -torch.inf
        scores[:, latent] = -torch.inf
    return assigned


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


@dataclass(frozen=True, slots=True)
class MeanMaps:
    """``mean`` float16 [bins, concepts, patches, d], over the images of a concept at a timestep.

    ``size`` is (h, w) of the block's maps, with h w patches, or () where its output is a sequence.
    """

    mean: Tensor
    size: tuple[int, ...]

    def nearest(self, concepts: Sequence[int]) -> tuple[int, ...]:
        """For each of the concepts, which of all others is nearest, over all timesteps and places."""
        left = [number for number in range(self.mean.shape[1]) if number not in concepts]
        return tuple(min(left, key=lambda other, own=own: self._distance(own, other)) for own in concepts)  # type: ignore[misc]

    def _distance(self, one: int, other: int) -> float:
        return (self.mean[:, one].float() - self.mean[:, other].float()).square().sum().item()

    def moves(self, concepts: Sequence[int], anchors: Sequence[int]) -> Tensor:
        """float32 [bins, concepts, patches, d]: from the mean of each of ``concepts`` to that of its anchor."""
        return self.mean[:, list(anchors)].float() - self.mean[:, list(concepts)].float()


def at_size(moves: Tensor, size: tuple[int, ...], x: Tensor) -> Tensor:
    """``moves`` [concepts, patches, d] between maps of ``size`` for the block's output ``x``.

    For maps [B, C, h, w] of another size, they are interpolated. UserError for sequences of another length, in which a
    place has no name.
    """
    if x.dim() == 4 and tuple(x.shape[2:]) != size:
        maps = moves.transpose(1, 2).unflatten(2, size)  # type: ignore[no-untyped-call]
        resized = torch.nn.functional.interpolate(maps, size=x.shape[2:], mode="bilinear", antialias=True)
        return resized.flatten(2).transpose(1, 2)
    if x.dim() == 3 and x.shape[1] != moves.shape[1]:
        raise UserError(
            f"The concepts were learned on {moves.shape[1]} patches and this image has {x.shape[1]}: "
            "draw it in the size of the activations, or set another saemnesia.intervention than move."
        )
    return moves


@torch.no_grad()
def measure_maps(cache: ActivationCache, timesteps: Tensor, concepts: int) -> MeanMaps:
    """Over the whole cache, summed in fp64; ``timesteps`` int64 [bins] as in ``Features``."""
    total, count = None, torch.zeros(concepts, dtype=torch.float64)
    for shard in range(len(cache.shards)):
        x, concept, steps, _ = cache.images(shard)
        place = (steps == timesteps[:, None]).int().argmax(dim=1)
        x = x[:, place].double()
        if total is None:
            total = x.new_zeros(concepts, *x.shape[1:])
        total.index_add_(0, concept, x)
        count.index_add_(0, concept, torch.ones_like(concept, dtype=torch.float64))
    if total is None:
        raise ValueError("the cache holds no shard")
    mean = total / count.clamp_min(1)[:, None, None, None]
    return MeanMaps(mean.transpose(0, 1).half().contiguous(), cache.map_size())
