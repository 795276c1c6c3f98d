"""Concepts taken out while a pipeline samples, by editing the patches of one block in which they are active."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.runs import strict_json
from erasediff.runs.atomic import atomic_directory
from erasediff.sae.activations import ActivationCache, shuffled
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.features import Features
from erasediff.sae.hooks import as_before, as_patches, at_block, denoiser_of

Intervention = Literal["steer", "replace"]
WEIGHTS, CONCEPTS = "sae.safetensors", "concepts.json"
FAR = 0.99
"""The quantile of reconstruction errors beyond which an edited patch counts as an artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptEraser:
    """Attaches to a diffusers pipeline, or to its network, and erases the concepts in ``erased``.

    A patch is edited where a latent of an erased concept exceeds its threshold, the mean over all concepts of mu(i, t)
    (SAeUron, SAEmnesia). The latent is read before TopK, which would hide a concept behind k louder latents, and so
    only the erased concepts' rows of the autoencoder are multiplied with. The timestep is looked up by its value, and
    every row of a batch is treated alike: any scheduler, any guidance or none, any height and width.

    intervention: "steer": z_i <- strength z_i for those latents, and x <- x + (z' - z) W_dec, which keeps what the
                  autoencoder does not explain. The published rule multiplies by mu(i, t, c) as well, so that its
                  strength depends on the units of activations; ours does not: do not carry strengths over.
                  "replace": x <- the nearest of ``bank``, patches of other concepts at that timestep, seen from x
                  without the concept's latents: negative strengths leave the distribution (2606.31699).
    bank:         float16 [bins, R, d];  limit: float32 [bins], the 0.99-quantile of relative reconstruction errors
    """

    autoencoder: SparseAutoencoder
    block: str
    concepts: tuple[str, ...]
    assigned: Tensor
    erased: tuple[int, ...]
    features: Features
    bank: Tensor
    limit: Tensor
    intervention: Intervention = "replace"
    strength: float = -1.0

    def erasing(self, concepts: Sequence[str]) -> Self:
        """The same for other concepts of those it knows. UserError for one that it does not."""
        unknown = [name for name in concepts if name not in self.concepts]
        if unknown:
            raise UserError(f"No latent stands for {unknown[0]!r}: it knows {', '.join(map(repr, self.concepts))}.")
        return replace(self, erased=tuple(self.concepts.index(name) for name in concepts))

    @contextmanager
    def attached(self, pipeline: Any, *, report: EditReport | None = None) -> Iterator[Self]:
        """Erase while the block lasts. Several may be attached, one inside the other, to the same block or others."""
        with at_block(denoiser_of(pipeline), self.block, lambda x, timestep: self.edit(x, timestep, report)):
            yield self

    def attach(self, pipeline: Any) -> ExitStack:
        """The same until ``close`` is called on what is returned."""
        stack = ExitStack()
        stack.enter_context(self.attached(pipeline))
        return stack

    @torch.no_grad()
    def edit(self, x: Tensor, timestep: Tensor, report: EditReport | None = None) -> Tensor:
        """The block's output [B, C, h, w] or [B, patches, C] without the erased concepts; its dtype is kept."""
        shape = as_patches(x)
        patches = shape.reshape(-1, shape.shape[-1]).float()
        self._move(patches.device)
        time = torch.as_tensor(timestep, device=patches.device).reshape(-1)[:1].float()
        nearest = (self.features.timesteps.to(patches.device) - time).abs().argmin()
        latents = self.assigned[list(self.erased)].to(patches.device)
        weight, bias = self.autoencoder.W_enc[latents], self.autoencoder.b_enc[latents]
        active = torch.addmm(bias, patches - self.autoencoder.b_dec, weight.T).relu()
        hit = active > self.features.mean.to(patches.device)[nearest].mean(dim=0)[latents]
        strength = self.strength if self.intervention == "steer" else 0.0
        change = torch.where(hit, (strength - 1.0) * active, 0.0)
        without = patches + change @ self.autoencoder.W_dec[latents]
        found = hit.any(dim=1)
        edited = torch.where(found[:, None], without, patches)
        if self.intervention == "replace":
            bank = self.bank.to(patches.device)[nearest].float()
            edited = torch.where(found[:, None], bank[torch.cdist(without, bank).argmin(dim=1)], patches)
        if report is not None:
            report.add(found, reconstruction_error(self.autoencoder, edited) > self.limit.to(x.device)[nearest])
        return as_before(edited.reshape(shape.shape), x).to(x.dtype)

    def _move(self, device: torch.device) -> None:
        if self.autoencoder.W_enc.device != device:
            self.autoencoder.to(device)

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """The folder ``path`` with sae.safetensors and concepts.json. UserError if it exists, unless ``overwrite``."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.autoencoder.state_dict().items()}
        tensors |= {"mean": self.features.mean, "timesteps": self.features.timesteps, "assigned": self.assigned}
        tensors |= {"bank": self.bank, "limit": self.limit}
        described = {
            "format": 1,
            "block": self.block,
            "k": self.autoencoder.k,
            "concepts": list(self.concepts),
            "erased": [self.concepts[number] for number in self.erased],
            "intervention": self.intervention,
            "strength": self.strength,
        }
        with atomic_directory(path, replace=overwrite) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
            (folder / CONCEPTS).write_text(strict_json.dumps(described) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """What ``save`` wrote. UserError for a folder that is not one, or damaged."""
        try:
            described = json.loads((path / CONCEPTS).read_text())
            tensors = load_file(path / WEIGHTS)
            names = tuple(described["concepts"])
            autoencoder = SparseAutoencoder(tensors["W_enc"].shape[1], tensors["W_enc"].shape[0], described["k"])
            autoencoder.load_state_dict({name: tensors[name] for name in autoencoder.state_dict()})
            return cls(
                autoencoder=autoencoder.requires_grad_(False),
                block=described["block"],
                concepts=names,
                assigned=tensors["assigned"],
                erased=tuple(names.index(name) for name in described["erased"]),
                features=Features(tensors["mean"], tensors["timesteps"]),
                bank=tensors["bank"],
                limit=tensors["limit"],
                intervention=described["intervention"],
                strength=described["strength"],
            )
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path} holds no concept eraser that can be read ({error}).") from error


class EditReport:
    """Counts of what an eraser edits, on the device; read only when asked for."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, found: Tensor, far: Tensor) -> None:
        counts = torch.stack([found.new_full((), found.numel(), dtype=torch.int64), found.sum(), (found & far).sum()])
        self.counts = counts if self.counts is None else self.counts + counts

    @property
    def edited_rate(self) -> float:
        """The share of patches that were edited."""
        total, edited, _ = self.counts.tolist() if self.counts is not None else (0, 0, 0)
        return edited / max(1, total)

    @property
    def artifact_rate(self) -> float:
        """The share of edited patches that are further from what the autoencoder can express than 99% of real ones.

        A rate of patches, not of images: not to be compared with the rates of 2606.31699, which people judged.
        """
        _, edited, far = self.counts.tolist() if self.counts is not None else (0, 0, 0)
        return far / max(1, edited)


@torch.no_grad()
def reconstruction_error(autoencoder: SparseAutoencoder, x: Tensor) -> Tensor:
    """|x - x^|^2 / |x|^2 of each patch, [N]."""
    error: Tensor = (x - autoencoder(x)).square().sum(dim=1) / x.square().sum(dim=1).clamp_min(1e-12)
    return error


@torch.no_grad()
def concept_free(
    autoencoder: SparseAutoencoder, cache: ActivationCache, timesteps: Tensor, forgotten: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """(bank float16 [bins, size, d] of patches of no forgotten concept, limit float32 [bins] of errors)."""
    kept: list[list[Tensor]] = [[] for _ in timesteps]
    per_shard = -(-size // max(1, len(cache.shards))) * 4
    for number in range(len(cache.shards)):
        patches = cache.read(number)
        other = ~torch.isin(patches.concept, torch.tensor(list(forgotten)))
        for place, timestep in enumerate(timesteps):
            x = patches.x[other & (patches.timestep == timestep)]
            kept[place].append(x[shuffled(len(x), 0, number, place)[:per_shard]])
    pools = [torch.cat(parts) for parts in kept]
    if min(map(len, pools)) == 0:
        raise ValueError("the cache holds no patches of other concepts")
    chosen = [pool[shuffled(len(pool), 1, 0, place)] for place, pool in enumerate(pools)]
    device = autoencoder.W_enc.device
    limit = torch.stack([reconstruction_error(autoencoder, pool.to(device)).quantile(FAR).cpu() for pool in chosen])
    smallest = min(size, *(len(pool) for pool in chosen))
    return torch.stack([pool[:smallest] for pool in chosen]).half(), limit
