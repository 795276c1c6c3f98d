"""Concept eraser: edits the patches of one block in which a concept is active, while a pipeline samples."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io import jsonl
from erasediff.io.atomic import atomic_directory
from erasediff.sae.activations import ActivationCache, shuffled
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.concepts import Features, MeanMaps, Thresholds, at_size
from erasediff.sae.hooks import as_before, as_patches, at_block, denoiser_of

Detection = Literal["published", "patch", "image"]
Intervention = Literal["published", "steer", "replace", "move"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """The detection and the intervention of a ``ConceptEraser`` for its E erased concepts, on one device.

    timesteps:  float32 [bins]; a table's row is that of the nearest one
    latents:    int64 [E]
    thresholds: float32 [bins, E], of what is detected
    factors:    float32 [bins, E], what an active latent is multiplied by; for "move" unused
    moves:      float32 [bins, E, patches, d], or None for other interventions; ``map_size`` as in ``MeanMaps``
    bank:       float16 [bins, R, d] and where it may be taken from, bool [bins, R], or None likewise
    limit:      float32 [bins], of relative reconstruction errors
    """

    autoencoder: SparseAutoencoder
    detection: Detection
    intervention: Intervention
    distance: float
    timesteps: Tensor
    latents: Tensor
    thresholds: Tensor
    factors: Tensor
    moves: Tensor | None
    map_size: tuple[int, ...]
    bank: tuple[Tensor, Tensor] | None
    limit: Tensor

    @classmethod
    def of(cls, eraser: ConceptEraser, device: torch.device) -> Self:
        """Everything that an edit looks up is copied to ``device``, but for an autoencoder that is there."""
        erased = list(eraser.erased)
        latents = eraser.assigned[erased]
        own = eraser.features.mean[:, erased, latents]
        thresholds = {
            "published": lambda: eraser.features.mean.mean(dim=1)[:, latents],
            "patch": lambda: eraser.thresholds.patch[:, erased],
            "image": lambda: eraser.thresholds.image[:, erased],
        }[eraser.detection]()
        factors = {"published": eraser.strength * own, "steer": torch.full_like(own, eraser.strength)}
        moves = bank = None
        if eraser.intervention == "move":
            moves = eraser.maps.moves(erased, eraser.anchors).to(device)
        if eraser.intervention == "replace":
            others = ~torch.isin(eraser.bank_concepts, torch.tensor(erased))
            bank = eraser.bank.to(device), others.to(device)
        autoencoder = eraser.autoencoder
        if autoencoder.W_enc.device != device:
            autoencoder = copy.deepcopy(autoencoder).to(device)
        return cls(
            autoencoder=autoencoder,
            detection=eraser.detection,
            intervention=eraser.intervention,
            distance=eraser.distance,
            timesteps=eraser.features.timesteps.to(device).float(),
            latents=latents.to(device),
            thresholds=thresholds.to(device),
            factors=factors.get(eraser.intervention, torch.zeros_like(own)).to(device),
            moves=moves,
            map_size=eraser.maps.size,
            bank=bank,
            limit=eraser.limit.to(device),
        )

    def __call__(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(the edited output, which of its patches were edited bool [B, patches], the timestep's bin int64 [1])."""
        patches = as_patches(x).float()
        time = torch.as_tensor(timestep).to(x.device, non_blocking=True).reshape(-1)[:1].float()
        # A bin of one element: an index without dimensions would be read by the host.
        place = (self.timesteps - time).abs().argmin(dim=0, keepdim=True)
        active = self._active(patches)
        excess = self._excess(active, self.thresholds[place])
        hit = excess > 0
        if self.moves is not None:
            # Where several are found, the one that is clearest: two moves would not add up to a place in between.
            clearest = torch.nn.functional.one_hot(excess.argmax(dim=2), len(self.latents))
            moves = at_size(self.moves[place][0], self.map_size, x)
            edited = patches + self.distance * torch.einsum("bpe,epd->bpd", (hit & clearest.bool()).float(), moves)
        else:
            change = torch.where(hit, (self.factors[place] - 1.0) * active.relu(), 0.0)
            edited = patches + change @ self.autoencoder.W_dec[self.latents]
            if self.bank is not None:
                edited = torch.where(hit.any(dim=2)[..., None], self._nearest_in_bank(edited, place), patches)
        return as_before(edited, x).to(x.dtype), hit.any(dim=2), place

    def is_far(self, x: Tensor, place: Tensor) -> Tensor:
        """Which of the patches [N] of an output are further from what the autoencoder can express than ``limit``."""
        return reconstruction_error(self.autoencoder, as_patches(x).float().flatten(0, 1)) > self.limit[place]

    def _active(self, patches: Tensor) -> Tensor:
        """[B, patches, E]: the erased concepts' latents, as the detection has them."""
        if self.detection == "published":
            code = self.autoencoder.encode(patches.flatten(0, 1))
            own = code.indices[:, :, None] == self.latents
            return (code.values[:, :, None] * own).sum(dim=1).view(*patches.shape[:2], -1)
        weight, bias = self.autoencoder.W_enc[self.latents], self.autoencoder.b_enc[self.latents]
        return (patches - self.autoencoder.b_dec) @ weight.T + bias

    def _excess(self, active: Tensor, thresholds: Tensor) -> Tensor:
        """[B, patches, E]: by how much each exceeds its threshold; what is positive is edited."""
        if self.detection == "image":
            return (active.mean(dim=1, keepdim=True) - thresholds).expand_as(active)
        return active - thresholds

    def _nearest_in_bank(self, patches: Tensor, place: Tensor) -> Tensor:
        assert self.bank is not None
        bank, others = (part[place][0] for part in self.bank)
        distances = torch.cdist(patches.flatten(0, 1), bank.float()).masked_fill(~others, torch.inf)
        return bank[distances.argmin(dim=1)].float().view_as(patches)


@torch.no_grad()
def reconstruction_error(autoencoder: SparseAutoencoder, x: Tensor) -> Tensor:
    """|x - x^|^2 / |x|^2 of each patch, [N]."""
    error: Tensor = (x - autoencoder(x)).square().sum(dim=1) / x.square().sum(dim=1).clamp_min(1e-12)
    return error


WEIGHTS, CONCEPTS = "sae.safetensors", "concepts.json"
FAR = 0.99
"""The quantile of reconstruction errors beyond which an edited patch counts as an artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptEraser:
    """Attaches to a diffusers pipeline, or to its network, and erases the concepts in ``erased``.

    Patches are edited in which a concept is detected. The timestep is looked up by its value, and every row of a batch
    is treated alike: any scheduler, any guidance or none, any height and width. Where later
    blocks attend to the prompt, too, what it says reaches the prediction by other ways than ``block``.

    detection:    "published" (SAeUron, 2501.18052, section 4; SAEmnesia, 2509.21379): z_i > mean over concepts of
                  mu(i, t), z after TopK, each patch for itself.
                  "patch": ours, the latent before TopK, which hides a concept behind k louder latents, exceeds a
                  threshold calibrated at each timestep (``Thresholds``); each patch for itself.
                  "image": ours, the same of the mean over an image's patches; then all of them are edited, since what
                  is left of a concept in some patches is enough to draw it.
    intervention: "published": z_i <- strength mu(i, t, c) z_i, x <- x + (z' - z) W_dec, which keeps what the
                  autoencoder does not explain; its strength depends on the units of the activations.
                  "steer": ours, without the factor mu(i, t, c): do not carry strengths over.
                  "replace": x <- the nearest patch of ``bank`` at that timestep of a concept that is not erased, seen
                  from x without the erased latents; negative strengths leave the distribution (after 2606.31699, which
                  also detects by latents and puts concept-free patches in the place; which ones is ours). The nearest
                  patches of other concepts still make up the erased one where it shares most of its parts with them.
                  "move": ours, x <- x + distance (m(t, a, p) - m(t, c, p)), between the mean activations of a
                  concept's anchor, another concept, and its own, at the timestep and at the patch's place p. A concept
                  is a pattern over places, which no single direction, such as a row of W_dec, can turn into another.
                  With a distance above 1 the first steps leave less for those in which detection is less sure.
    assigned:     int64 [concepts], the latent of each
    anchors:      for each in ``erased``, the number of the concept that "move" puts in its place
    bank:         float16 [bins, R, d], with the concept of each patch, int64 [bins, R]
    maps:         of mean activations, for "move"
    limit:        float32 [bins], the 0.99-quantile of relative reconstruction errors
    """

    autoencoder: SparseAutoencoder
    block: str
    concepts: tuple[str, ...]
    assigned: Tensor
    erased: tuple[int, ...]
    anchors: tuple[int, ...]
    features: Features
    thresholds: Thresholds
    bank: Tensor
    bank_concepts: Tensor
    maps: MeanMaps
    limit: Tensor
    detection: Detection = "image"
    intervention: Intervention = "move"
    strength: float = -1.0
    distance: float = 1.0
    _edits: dict[torch.device, Edit] = field(default_factory=dict, init=False, repr=False, compare=False)

    def erasing(self, concepts: Sequence[str], anchors: Sequence[str] = ()) -> Self:
        """The same for other concepts of those it knows.

        ``anchors``, one for each or one for all, take their places; without them, of those that are not erased the
        nearest. UserError for a concept that it does not know, for an anchor that is erased, and for erasing all.
        """
        unknown = [name for name in (*concepts, *anchors) if name not in self.concepts]
        if unknown:
            raise UserError(f"No latent stands for {unknown[0]!r}: it knows {', '.join(map(repr, self.concepts))}.")
        if set(concepts) == set(self.concepts):
            raise UserError("No concept would be left to draw in the place of the others: leave one.")
        erased = tuple(self.concepts.index(name) for name in dict.fromkeys(concepts))
        asked = tuple(self.concepts.index(name) for name in anchors)
        if len(asked) not in (0, 1, len(erased)):
            raise UserError(
                f"There are {len(asked)} anchors for {len(erased)} concepts: give one for each, or for all."
            )
        if set(asked) & set(erased):
            raise UserError(f"An anchor takes the place of what is erased: {anchors[0]!r} cannot be erased itself.")
        nearest = self.maps.nearest(erased) if not asked else asked * (len(erased) if len(asked) == 1 else 1)
        return replace(self, erased=erased, anchors=nearest)

    @contextmanager
    def attached(self, pipeline: Any, *, report: EditReport | None = None) -> Iterator[Self]:
        """Erase while the block lasts. Several may be attached, one inside the other, to the same block or others."""
        with self.attach(pipeline, report=report):
            yield self

    def attach(self, pipeline: Any, *, report: EditReport | None = None) -> ExitStack:
        """The same until ``close`` is called on what is returned."""
        return at_block(denoiser_of(pipeline), self.block, lambda x, timestep: self.edit(x, timestep, report))

    def edit(self, x: Tensor, timestep: Tensor, report: EditReport | None = None) -> Tensor:
        """The block's output [B, C, h, w] or [B, patches, C] without the erased concepts; its dtype is kept.

        Gradients pass, but for "replace", so that an attack can be one on the model as it is sampled.
        """
        if not self.erased:
            return x
        edit = self._edits.get(x.device)
        if edit is None:
            edit = self._edits[x.device] = Edit.of(self, x.device)
        edited, found, place = edit(x, timestep)
        if report is not None:
            report.add(found.flatten(), edit.is_far(edited, place))
        return edited

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """The folder ``path`` with sae.safetensors and concepts.json. UserError if it exists, unless ``overwrite``."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.autoencoder.state_dict().items()}
        tensors |= {"mean": self.features.mean, "timesteps": self.features.timesteps, "assigned": self.assigned}
        tensors |= {"threshold.patch": self.thresholds.patch, "threshold.image": self.thresholds.image}
        tensors |= {"bank": self.bank, "bank.concepts": self.bank_concepts, "limit": self.limit}
        tensors |= {"maps": self.maps.mean, "maps.size": torch.tensor(self.maps.size)}
        described = {
            "format": 2,
            "block": self.block,
            "k": self.autoencoder.k,
            "concepts": list(self.concepts),
            "erased": [self.concepts[number] for number in self.erased],
            "anchors": [self.concepts[number] for number in self.anchors],
            "detection": self.detection,
            "intervention": self.intervention,
            "strength": self.strength,
            "distance": self.distance,
        }
        with atomic_directory(path, replace=overwrite) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
            (folder / CONCEPTS).write_text(jsonl.dumps(described) + "\n")

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
                anchors=tuple(names.index(name) for name in described["anchors"]),
                features=Features(tensors["mean"], tensors["timesteps"]),
                thresholds=Thresholds(tensors["threshold.patch"], tensors["threshold.image"]),
                bank=tensors["bank"],
                bank_concepts=tensors["bank.concepts"],
                maps=MeanMaps(tensors["maps"], tuple(tensors["maps.size"].tolist())),
                limit=tensors["limit"],
                detection=described["detection"],
                intervention=described["intervention"],
                strength=described["strength"],
                distance=described["distance"],
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
def sample_bank(
    autoencoder: SparseAutoencoder, cache: ActivationCache, timesteps: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(bank float16 [bins, size, d], the concept of each patch int64 [bins, size], limit float32 [bins] of errors)."""
    kept: list[list[Tensor]] = [[] for _ in timesteps]
    concepts: list[list[Tensor]] = [[] for _ in timesteps]
    per_shard = -(-size // max(1, len(cache.shards))) * 4
    for number in range(len(cache.shards)):
        patches = cache.read(number)
        for place, timestep in enumerate(timesteps):
            here = patches.timestep == timestep
            x, concept = patches.x[here], patches.concept[here]
            chosen = shuffled(len(x), 0, number, place)[:per_shard]
            kept[place].append(x[chosen])
            concepts[place].append(concept[chosen])
    pools, labels = [torch.cat(parts) for parts in kept], [torch.cat(parts) for parts in concepts]
    device = autoencoder.W_enc.device
    limit = torch.stack([reconstruction_error(autoencoder, pool.to(device)).quantile(FAR).cpu() for pool in pools])
    smallest = min(size, *(len(pool) for pool in pools))
    order = [shuffled(len(pool), 1, 0, place)[:smallest] for place, pool in enumerate(pools)]
    bank = torch.stack([pool[chosen] for pool, chosen in zip(pools, order, strict=True)]).half()
    return bank, torch.stack([label[chosen] for label, chosen in zip(labels, order, strict=True)]), limit
