"""Which latent stands for which concept: mean activations over concepts and timesteps, and scores from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
