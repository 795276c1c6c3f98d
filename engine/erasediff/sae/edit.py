"""What an eraser does to one block's output, from tensors that lie where the block computes: the host never waits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from erasediff.sae.autoencoder import SparseAutoencoder
from erasediff.sae.hooks import as_before, as_patches
from erasediff.sae.maps import at_size

if TYPE_CHECKING:
    from erasediff.sae.eraser import ConceptEraser

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
