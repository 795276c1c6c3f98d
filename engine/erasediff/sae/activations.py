"""A block's activations while a model samples, streamed to disk: one shard per batch of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasediff.process import NoiseRole, noise_key
from erasediff.runs.atomic import atomic_file, atomic_write
from erasediff.sae.hooks import as_patches, at_block
from erasediff_kernels import philox_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """x float32 [N, d], and for each patch the number of its prompt and its timestep, int64 [N]."""

    x: Tensor
    concept: Tensor
    timestep: Tensor


@dataclass(frozen=True, slots=True)
class ActivationCache:
    """Shards with ``activations`` float16 [images, steps, patches, d], ``concept`` [images], ``timestep`` [steps].

    Memory holds one shard at a time, whatever their number.
    """

    shards: tuple[Path, ...]

    def shard_patches(self, shard: int) -> int:
        with safe_open(self.shards[shard], "pt") as file:
            images, steps, patches, _ = file.get_slice("activations").get_shape()
        return int(images * steps * patches)

    def read(self, shard: int) -> Patches:
        tensors = load_file(self.shards[shard])
        images, steps, patches, dim = tensors["activations"].shape
        shape = (images, steps, patches)
        return Patches(
            x=tensors["activations"].float().reshape(-1, dim),
            concept=tensors["concept"][:, None, None].expand(shape).reshape(-1),
            timestep=tensors["timestep"][None, :, None].expand(shape).reshape(-1),
        )

    def batches(self, batch_size: int, seed: int, epochs: int, start: int = 0) -> Iterator[Patches]:
        """Batches of shuffled patches from batch ``start`` on: shards in an order, and the patches within a shard.

        The order is a function of (seed, epoch), so a resumed run sees what it would have seen.
        """
        sizes = [self.shard_patches(shard) for shard in range(len(self.shards))]
        passed = 0
        for epoch in range(epochs):
            for shard in shuffled(len(sizes), seed, epoch, 0).tolist():
                count = sizes[shard] // batch_size
                if passed + count <= start:
                    passed += count
                    continue
                patches = self.read(shard)
                order = shuffled(sizes[shard], seed, epoch, 1 + shard)
                for batch in range(max(0, start - passed), count):
                    chosen = order[batch * batch_size : (batch + 1) * batch_size]
                    yield Patches(
                        x=patches.x[chosen], concept=patches.concept[chosen], timestep=patches.timestep[chosen]
                    )
                passed += count

    def batch_count(self, batch_size: int, epochs: int) -> int:
        return epochs * sum(self.shard_patches(shard) // batch_size for shard in range(len(self.shards)))


def shuffled(count: int, seed: int, epoch: int, stream: int) -> Tensor:
    """A permutation of 0 .. count - 1 addressed by (seed, epoch, stream)."""
    ids = (torch.arange(count) << 20) | stream
    return philox_bits(ids, noise_key(seed, epoch, "cpu"), int(NoiseRole.ORDER), 1)[:, 0].argsort(stable=True)


def collect_activations(
    model: Any,
    block: str,
    prompts: Sequence[str],
    folder: Path,
    *,
    images_per_prompt: int,
    num_inference_steps: int,
    guidance_scale: float,
    seed: int = 0,
    batch_size: int = 4,
    progress: Any = None,
) -> ActivationCache:
    """Sample ``images_per_prompt`` images of each prompt and keep what ``block`` gives out for the condition.

    The folder within ``folder`` is named by model, block, prompts and sampling, so another model never reads it; a
    shard that is there already is not made again, and so a killed run goes on where it was. Prompt number p is concept
    p. Of classifier-free guidance's two halves the conditional one is kept; without guidance there is only that one.
    """
    asked = {
        "network": model.denoiser_hash(),
        "encoders": model.hash,
        "scheduler": str(model.scheduler.config),
        "block": block,
        "prompts": list(prompts),
        "sampling": [images_per_prompt, num_inference_steps, guidance_scale, seed, batch_size],
    }
    place = folder / hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    place.mkdir(parents=True, exist_ok=True)
    atomic_write(place / "asked.json", json.dumps(asked, indent=1))
    numbers = [number for number in range(len(prompts)) for _ in range(images_per_prompt)]
    shards = []
    for first in range(0, len(numbers), batch_size):
        part = numbers[first : first + batch_size]
        shard = place / f"shard-{first:07d}.safetensors"
        shards.append(shard)
        if not shard.exists():
            tensors = _record(
                model, block, [prompts[number] for number in part], num_inference_steps, guidance_scale, seed + first
            )
            with atomic_file(shard) as partial:
                save_file({**tensors, "concept": torch.tensor(part)}, partial)
        if progress is not None:
            progress(len(part))
    return ActivationCache(tuple(shards))


def _record(
    model: Any, block: str, prompts: list[str], steps: int, guidance_scale: float, seed: int
) -> dict[str, Tensor]:
    network: nn.Module = model.denoiser_module
    activations: list[Tensor] = []
    timesteps: list[Tensor] = []

    def keep(x: Tensor, timestep: Tensor) -> None:
        activations.append(as_patches(x)[-len(prompts) :].detach().to("cpu", torch.float16))
        timesteps.append(torch.as_tensor(timestep).detach().reshape(-1)[0].cpu().long())

    with at_block(network, block, keep):
        model.sample(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=len(prompts),
        )
    return {"activations": torch.stack(activations, dim=1).contiguous(), "timestep": torch.stack(timesteps)}
