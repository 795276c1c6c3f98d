"""Concept eraser: edits the patches of one block in which a concept is active, while a pipeline samples."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io import jsonl
from erasediff.io.atomic import atomic_directory
from erasediff.sae.activations import ActivationCache, shuffled
from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.concepts import Features, MeanMaps, Thresholds, at_size
from erasediff.sae.eraser_description import EraserDescription, read_tensors
from erasediff.sae.hooks import as_before, as_patches, at_block, denoiser_of

Detection = Literal["published", "patch", "image"]
Intervention = Literal["published", "steer", "replace", "move"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Detection and intervention of a ``ConceptEraser`` for its E erased concepts, on one device.

    Attributes:
        autoencoder: On the same device.
        detection: As in ``ConceptEraser``.
        intervention: As in ``ConceptEraser``.
        distance: As in ``ConceptEraser``.
        timesteps: float32 [bins]; tables are read at the nearest one.
        latents: int64 [E].
        thresholds: float32 [bins, E], of the detected quantity.
        factors: float32 [bins, E], multipliers of active latents; unused for "move".
        moves: float32 [bins, E, patches, d]; None for other interventions than "move".
        map_size: As ``MeanMaps.size``.
        bank: Patches float16 [bins, R, d] and those that may replace others, bool [bins, R]; None for other
            interventions than "replace".
        limit: float32 [bins], of relative reconstruction errors.
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
        """Copy the eraser's tables to ``device``, and its autoencoder unless it is there already."""
        erased = list(eraser.erased)
        latents = eraser.assigned[erased]
        means = eraser.features.mean[:, erased, latents]
        thresholds = {
            "published": lambda: eraser.features.mean.mean(dim=1)[:, latents],
            "patch": lambda: eraser.thresholds.patch[:, erased],
            "image": lambda: eraser.thresholds.image[:, erased],
        }[eraser.detection]()
        factors = {"published": eraser.strength * means, "steer": torch.full_like(means, eraser.strength)}
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
            factors=factors.get(eraser.intervention, torch.zeros_like(means)).to(device),
            moves=moves,
            map_size=eraser.maps.size,
            bank=bank,
            limit=eraser.limit.to(device),
        )

    def __call__(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Edit a block's output.

        Returns:
            (edited output, edited patches bool [B, patches], bin of the timestep int64 [1]).
        """
        patches = as_patches(x).float()
        time = torch.as_tensor(timestep).to(x.device, non_blocking=True).reshape(-1)[:1].float()
        # A bin of one element: an index without dimensions would be read by the host.
        time_bin = (self.timesteps - time).abs().argmin(dim=0, keepdim=True)
        active = self._active(patches)
        excess = self._excess(active, self.thresholds[time_bin])
        hit = excess > 0
        if self.moves is not None:
            # Where several are found, the one that is clearest: two moves would not add up to a place in between.
            clearest = torch.nn.functional.one_hot(excess.argmax(dim=2), len(self.latents))
            moves = at_size(self.moves[time_bin][0], self.map_size, x)
            edited = patches + self.distance * torch.einsum("bpe,epd->bpd", (hit & clearest.bool()).float(), moves)
        else:
            change = torch.where(hit, (self.factors[time_bin] - 1.0) * active.relu(), 0.0)
            edited = patches + change @ self.autoencoder.W_dec[self.latents]
            if self.bank is not None:
                edited = torch.where(hit.any(dim=2)[..., None], self._nearest_in_bank(edited, time_bin), patches)
        return as_before(edited, x).to(x.dtype), hit.any(dim=2), time_bin

    def is_far(self, x: Tensor, time_bin: Tensor) -> Tensor:
        """Mask bool [N] of the output's patches whose relative reconstruction error exceeds ``limit``."""
        return reconstruction_error(self.autoencoder, as_patches(x).float().flatten(0, 1)) > self.limit[time_bin]

    def _active(self, patches: Tensor) -> Tensor:
        """[B, patches, E]: the erased concepts' latents, as the detection has them."""
        if self.detection == "published":
            code = self.autoencoder.encode(patches.flatten(0, 1))
            is_latent = code.indices[:, :, None] == self.latents
            return (code.values[:, :, None] * is_latent).sum(dim=1).view(*patches.shape[:2], -1)
        weight, bias = self.autoencoder.W_enc[self.latents], self.autoencoder.b_enc[self.latents]
        return (patches - self.autoencoder.b_dec) @ weight.T + bias

    def _excess(self, active: Tensor, thresholds: Tensor) -> Tensor:
        """[B, patches, E]: by how much each exceeds its threshold; what is positive is edited."""
        if self.detection == "image":
            return (active.mean(dim=1, keepdim=True) - thresholds).expand_as(active)
        return active - thresholds

    def _nearest_in_bank(self, patches: Tensor, time_bin: Tensor) -> Tensor:
        assert self.bank is not None
        bank, others = (part[time_bin][0] for part in self.bank)
        distances = torch.cdist(patches.flatten(0, 1), bank.float()).masked_fill(~others, torch.inf)
        return bank[distances.argmin(dim=1)].float().view_as(patches)


@torch.no_grad()
def reconstruction_error(autoencoder: SparseAutoencoder, x: Tensor) -> Tensor:
    """Relative reconstruction error |x - x^|^2 / |x|^2 of each patch, [N]."""
    error: Tensor = (x - autoencoder(x)).square().sum(dim=1) / x.square().sum(dim=1).clamp_min(1e-12)
    return error


WEIGHTS, CONCEPTS = "sae.safetensors", "concepts.json"
FAR = 0.99
"""The quantile of reconstruction errors beyond which an edited patch counts as an artifact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptEraser:
    """Eraser of the concepts ``erased``, attached to a diffusers pipeline or its network.

    Patches in which a concept is detected are edited. Timesteps are looked up by value and all rows of a batch are
    treated alike, so any scheduler, guidance, height and width works. If later blocks attend to the prompt, too, it
    also reaches the prediction by other ways than ``block``.

    Attributes:
        autoencoder: Sparse autoencoder of the block's activations.
        block: Name of the block within the denoiser.
        concepts: Names of all concepts.
        assigned: int64 [concepts], the latent of each concept.
        erased: Indices of the erased concepts.
        anchors: For each in ``erased``, the index of the concept that "move" maps it to.
        features: Mean activations of the latents.
        thresholds: Calibrated thresholds.
        bank: float16 [bins, R, d], patches for "replace".
        bank_concepts: int64 [bins, R], the concept of each patch of ``bank``.
        maps: Mean activation maps, for "move".
        limit: float32 [bins], the 0.99-quantile of relative reconstruction errors.
        detection: "published" (SAeUron, 2501.18052, section 4; SAEmnesia, 2509.21379): z_i > mean over concepts of
            mu(i, t), z after TopK, per patch.
            "patch" (ours): the latent before TopK, which hides a concept behind k louder latents, exceeds a threshold
            calibrated at each timestep; per patch.
            "image" (ours): as "patch" with the mean over an image's patches; then all of them are edited, since what
            is left of a concept in some patches is enough to draw it.
        intervention: "published": z_i <- strength mu(i, t, c) z_i, x <- x + (z' - z) W_dec, which keeps what the
            autoencoder does not explain; its strength depends on the units of the activations.
            "steer" (ours): without the factor mu(i, t, c): strengths are not comparable between the two.
            "replace": x <- the patch of ``bank``, at that timestep and of a concept that is not erased, that is nearest
            to x without the erased latents; negative strengths leave the distribution (after 2606.31699, which also
            detects by latents and inserts concept-free patches; their choice is ours). The nearest patches of other
            concepts still make up the erased one if it shares most of its parts with them.
            "move" (ours): x <- x + distance (m(t, a, p) - m(t, c, p)), between the mean activations of the concept's
            anchor a and its own, at the timestep and the patch's position p. A concept is a pattern over positions,
            which no single direction, such as a row of W_dec, can turn into another.
        strength: Multiplier of "published" and "steer".
        distance: Multiplier of "move". Above 1, the first steps leave less to those in which detection is less sure.
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
        """Eraser of other concepts, with the same autoencoder.

        Args:
            concepts: Names of the concepts to erase.
            anchors: Names of the concepts to map them to, one for each or one for all; by default the nearest concept
                that is not erased.

        Raises:
            UserError: Unknown concept, erased anchor, wrong number of anchors, or no concept left.
        """
        unknown = [name for name in (*concepts, *anchors) if name not in self.concepts]
        if unknown:
            raise UserError(f"No latent stands for {unknown[0]!r}: it knows {', '.join(map(repr, self.concepts))}.")
        if set(concepts) == set(self.concepts):
            raise UserError("No concept would be left to draw in the place of the others: leave one.")
        erased = tuple(self.concepts.index(name) for name in dict.fromkeys(concepts))
        anchor_ids = tuple(self.concepts.index(name) for name in anchors)
        if len(anchor_ids) not in (0, 1, len(erased)):
            raise UserError(
                f"There are {len(anchor_ids)} anchors for {len(erased)} concepts: give one for each, or for all."
            )
        if set(anchor_ids) & set(erased):
            raise UserError(f"An anchor takes the place of what is erased: {anchors[0]!r} cannot be erased itself.")
        if not anchor_ids:
            anchor_ids = self.maps.nearest(erased)
        elif len(anchor_ids) == 1:
            anchor_ids *= len(erased)
        return replace(self, erased=erased, anchors=anchor_ids)

    @contextmanager
    def attached(self, pipeline: Any, *, report: EditReport | None = None) -> Iterator[Self]:
        """Erase within a ``with`` statement. Several erasers may be nested, at the same block or others."""
        with self.attach(pipeline, report=report):
            yield self

    def attach(self, pipeline: Any, *, report: EditReport | None = None) -> ExitStack:
        """Erase until ``close`` is called on the returned stack."""
        return at_block(denoiser_of(pipeline), self.block, lambda x, timestep: self.edit(x, timestep, report))

    def edit(self, x: Tensor, timestep: Tensor, report: EditReport | None = None) -> Tensor:
        """Remove the erased concepts from a block's output.

        Gradients pass, except for "replace", so that attacks can be run on the model as it is sampled.

        Args:
            x: [B, C, h, w] or [B, patches, C].
            timestep: Timestep of the call; its first element is used.
            report: Counts the edited patches.

        Returns:
            The edited output, in the shape and dtype of ``x``.
        """
        if not self.erased:
            return x
        edit = self._edits.get(x.device)
        if edit is None:
            edit = self._edits[x.device] = Edit.of(self, x.device)
        edited, hit, time_bin = edit(x, timestep)
        if report is not None:
            report.add(hit.flatten(), edit.is_far(edited, time_bin))
        return edited

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the folder ``path``: sae.safetensors, concepts.json. UserError if it exists, unless ``overwrite``."""
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
        """Load an eraser written by ``save``; UserError if the folder is not one, or damaged."""
        try:
            described = EraserDescription.read(path / CONCEPTS)
            tensors = read_tensors(path / WEIGHTS)
            names = tuple(described.concepts)
            autoencoder = SparseAutoencoder(tensors["W_enc"].shape[1], tensors["W_enc"].shape[0], described.k)
            autoencoder.load_state_dict({name: tensors[name] for name in autoencoder.state_dict()})
            return cls(
                autoencoder=autoencoder.requires_grad_(False),
                block=described.block,
                concepts=names,
                assigned=tensors["assigned"],
                erased=tuple(names.index(name) for name in described.erased),
                anchors=tuple(names.index(name) for name in described.anchors),
                features=Features(tensors["mean"], tensors["timesteps"]),
                thresholds=Thresholds(tensors["threshold.patch"], tensors["threshold.image"]),
                bank=tensors["bank"],
                bank_concepts=tensors["bank.concepts"],
                maps=MeanMaps(tensors["maps"], tuple(tensors["maps.size"].tolist())),
                limit=tensors["limit"],
                detection=described.detection,
                intervention=described.intervention,
                strength=described.strength,
                distance=described.distance,
            )
        except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} holds no concept eraser that can be read ({error}).") from error


class EditReport:
    """Counts of edited patches, accumulated on the device and read only by the properties."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def add(self, edited: Tensor, far: Tensor) -> None:
        """Count the masks ``edited`` and ``far``, bool [patches], of one call."""
        total = edited.new_full((), edited.numel(), dtype=torch.int64)
        counts = torch.stack([total, edited.sum(), (edited & far).sum()])
        self.counts = counts if self.counts is None else self.counts + counts

    @property
    def edited_rate(self) -> float:
        """Share of patches that were edited."""
        total, edited, _ = self.counts.tolist() if self.counts is not None else (0, 0, 0)
        return edited / max(1, total)

    @property
    def artifact_rate(self) -> float:
        """Share of edited patches with a larger reconstruction error than 99% of real ones.

        A rate of patches, not of images: not to be compared with the rates of 2606.31699, which people judged.
        """
        _, edited, far = self.counts.tolist() if self.counts is not None else (0, 0, 0)
        return far / max(1, edited)


@torch.no_grad()
def sample_bank(
    autoencoder: SparseAutoencoder, cache: ActivationCache, timesteps: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample real patches of each timestep, and the 0.99-quantile of their reconstruction errors.

    Returns:
        (bank float16 [bins, size, d], the concept of each patch int64 [bins, size], limit float32 [bins]); fewer than
        ``size`` patches if a timestep has fewer.
    """
    sampled: list[list[Tensor]] = [[] for _ in timesteps]
    concepts: list[list[Tensor]] = [[] for _ in timesteps]
    per_shard = -(-size // max(1, len(cache.shards))) * 4
    for number in range(len(cache.shards)):
        patches = cache.read(number)
        for time_bin, timestep in enumerate(timesteps):
            here = patches.timestep == timestep
            x, concept = patches.x[here], patches.concept[here]
            chosen = shuffled(len(x), 0, number, time_bin)[:per_shard]
            sampled[time_bin].append(x[chosen])
            concepts[time_bin].append(concept[chosen])
    pools, labels = [torch.cat(parts) for parts in sampled], [torch.cat(parts) for parts in concepts]
    device = autoencoder.W_enc.device
    limit = torch.stack([reconstruction_error(autoencoder, pool.to(device)).quantile(FAR).cpu() for pool in pools])
    smallest = min(size, *(len(pool) for pool in pools))
    order = [shuffled(len(pool), 1, 0, time_bin)[:smallest] for time_bin, pool in enumerate(pools)]
    bank = torch.stack([pool[chosen] for pool, chosen in zip(pools, order, strict=True)]).half()
    return bank, torch.stack([label[chosen] for label, chosen in zip(labels, order, strict=True)]), limit
