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
    """Mean activations of latents by timestep and concept.

    Attributes:
        mean: float32 [bins, concepts, n], mu(i, t, c): the mean activation of latent i over the patches of concept c.
        timesteps: int64 [bins], the cached timesteps, ascending. A sampler with other timesteps gets the nearest, so
            any scheduler and number of steps works.
    """

    mean: Tensor
    timesteps: Tensor

    def scores(self) -> Tensor:
        """Concept scores of latents (SAeUron, 2501.18052, section 4).

        score(i, t, c) = mu(i, t, c) / (sum_j mu(j, t, c) + d) - mu(i, t, ~c) / (sum_j mu(j, t, ~c) + d), d = 1e-8: the
        latent's share of concept c's activation less its share of that of ~c, the mean of the other concepts.

        Returns:
            float32 [bins, concepts, n].

        Raises:
            ValueError: There is a single concept.
        """
        concepts = self.mean.shape[1]
        if concepts < 2:
            raise ValueError("a score compares concepts: give at least two")
        others = (self.mean.sum(dim=1, keepdim=True) - self.mean) / (concepts - 1)
        share, share_of_others = (mu / (mu.sum(dim=2, keepdim=True) + DELTA) for mu in (self.mean, others))
        return share - share_of_others


@torch.no_grad()
def measure_features(autoencoder: SparseAutoencoder, cache: ActivationCache, concepts: int) -> Features:
    """Mean activations mu(i, t, c) over the whole cache, summed in fp64; one shard in memory at a time."""
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
    """Assign one latent to each concept, greedily by the mean score over timesteps.

    i_c = argmax_i score(i, c) as in SAEmnesia (2509.21379), which requires unique latents without saying how: here the
    highest score is assigned first, and its latent is no longer available to other concepts.

    Returns:
        int64 [concepts], without duplicates.
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
    """Detection thresholds on preactivations.

    Ours. The published threshold, the mean over concepts of mu, is one of activations after TopK: with a k of half the
    width of the block it lies where most patches of any concept are, and a latent rarely among the k has one near 0.

    Attributes:
        patch: float32 [bins, concepts], of one patch.
        image: float32 [bins, concepts], of the mean over an image's patches.
    """

    patch: Tensor
    image: Tensor


@dataclass(frozen=True, slots=True)
class Detection:
    """Detection quality at the calibrated threshold, by patches or by images.

    Attributes:
        recall: float32 [bins, concepts], the share of the concept's that are detected.
        false_positives: float32 [bins, concepts], the share of all others that are detected.
        auc: float32 [bins, concepts], the probability that one of the concept scores higher than one of another
            concept, at any threshold.
    """

    recall: Tensor
    false_positives: Tensor
    auc: Tensor

    def of(self, concept: int) -> dict[str, Any]:
        """Means over timesteps for one concept, by name."""
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
    """Calibrate detection thresholds by Youden's J (recall less false positives) at each timestep.

    Images of a concept under the prompt of another count neither as positives nor as negatives of it.

    Args:
        autoencoder: Trained autoencoder.
        assigned: int64 [concepts], the latent of each concept.
        cache: Activations, preferably held out from training.
        timesteps: int64 [bins], those of the cache.
        most_false_positives: Largest share of other concepts' patches, or images, that may exceed a threshold.

    Returns:
        (thresholds, detection of patches, detection of images).
    """
    scores, concept, drawn = _scores(autoencoder, assigned, cache, timesteps)
    patch, image = torch.empty(2, 4, len(timesteps), len(assigned))
    for number in range(len(assigned)):
        labelled = (concept == number) | (drawn != number)
        positive = concept[labelled] == number
        for time_bin in range(len(timesteps)):
            score = scores[labelled, time_bin, :, number]
            patch[:, time_bin, number] = _best_cut(
                score.reshape(-1), positive.repeat_interleave(score.shape[1]), most_false_positives
            )
            image[:, time_bin, number] = _best_cut(score.mean(dim=1), positive, most_false_positives)
    return Thresholds(patch[0], image[0]), Detection(*patch[1:]), Detection(*image[1:])


def _scores(
    autoencoder: SparseAutoencoder, assigned: Tensor, cache: ActivationCache, timesteps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(preactivations float32 [images, bins, patches, concepts], each image's concept and what it was drawn of)."""
    device = autoencoder.W_enc.device
    rows, bias = autoencoder.W_enc[assigned.to(device)], autoencoder.b_enc[assigned.to(device)]
    scores, concepts, drawn = [], [], []
    for shard in range(len(cache.shards)):
        x, concept, steps, shard_drawn = cache.images(shard)
        # A sampler of second order sees a timestep twice: the first time counts.
        step_index = (steps == timesteps[:, None]).int().argmax(dim=1)
        part = (x[:, step_index].float().to(device) - autoencoder.b_dec) @ rows.T + bias
        scores.append(part.cpu())
        concepts.append(concept)
        drawn.append(shard_drawn)
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
    """Mean activation maps by timestep and concept.

    Attributes:
        mean: float16 [bins, concepts, patches, d], over the images of a concept at a timestep.
        size: (h, w) of the block's maps, with h w patches, or () if its output is a sequence.
    """

    mean: Tensor
    size: tuple[int, ...]

    def nearest(self, concepts: Sequence[int]) -> tuple[int, ...]:
        """Nearest other concept of each of ``concepts``, by squared distance over all timesteps and patches."""
        others = [number for number in range(self.mean.shape[1]) if number not in concepts]
        return tuple(
            min(others, key=lambda other, concept=concept: self._distance(concept, other))  # type: ignore[misc]
            for concept in concepts
        )

    def _distance(self, one: int, other: int) -> float:
        return (self.mean[:, one].float() - self.mean[:, other].float()).square().sum().item()

    def moves(self, concepts: Sequence[int], anchors: Sequence[int]) -> Tensor:
        """Differences from the mean of each of ``concepts`` to its anchor's, float32 [bins, concepts, patches, d]."""
        return self.mean[:, list(anchors)].float() - self.mean[:, list(concepts)].float()


def at_size(moves: Tensor, size: tuple[int, ...], x: Tensor) -> Tensor:
    """Resize ``moves`` to the block's output.

    Args:
        moves: [concepts, patches, d], between maps of ``size``.
        size: (h, w) of the maps, or () for sequences.
        x: The block's output, maps [B, C, h, w] of any size or a sequence [B, patches, C].

    Returns:
        [concepts, patches of x, d]; maps of another size are interpolated.

    Raises:
        UserError: ``x`` is a sequence of another length, whose patches have no known positions.
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
    """Mean activation maps over the whole cache, summed in fp64; ``timesteps`` int64 [bins] as in ``Features``."""
    total, count = None, torch.zeros(concepts, dtype=torch.float64)
    for shard in range(len(cache.shards)):
        x, concept, steps, _ = cache.images(shard)
        step_index = (steps == timesteps[:, None]).int().argmax(dim=1)
        x = x[:, step_index].double()
        if total is None:
            total = x.new_zeros(concepts, *x.shape[1:])
        total.index_add_(0, concept, x)
        count.index_add_(0, concept, torch.ones_like(concept, dtype=torch.float64))
    if total is None:
        raise ValueError("the cache holds no shard")
    mean = total / count.clamp_min(1)[:, None, None, None]
    return MeanMaps(mean.transpose(0, 1).half().contiguous(), cache.map_size())
