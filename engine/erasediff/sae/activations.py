"""Activation cache: the outputs of a block while a model samples, one shard on the disk per batch of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasediff.diffusion.rng import NoiseRole, noise_key
from erasediff.io.atomic import atomic_file, atomic_write
from erasediff.sae.hooks import as_patches, at_block
from erasediff_kernels import philox_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Activation patches with their concepts and timesteps.

    Attributes:
        x: float32 [N, d], the patches.
        concept: int64 [N], the number of the concept that the patch's prompt asks for.
        timestep: int64 [N].
        drawn: int64 [N], the concept that the patch's image was drawn of: another than the prompt's if they are
            crossed.
        image_mean: float32 [N, d], the mean over the patches of the patch's image at that timestep.
    """

    x: Tensor
    concept: Tensor
    timestep: Tensor
    drawn: Tensor
    image_mean: Tensor

    def to(self, device: torch.device) -> Patches:
        return Patches(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class Images(NamedTuple):
    """Activations of one shard of the cache.

    Attributes:
        x: float16 [images, steps, patches, d].
        concept: int64 [images], as in ``Patches``.
        timestep: int64 [steps].
        drawn: int64 [images], as in ``Patches``.
    """

    x: Tensor
    concept: Tensor
    timestep: Tensor
    drawn: Tensor


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Images at timesteps: x float16 [M, patches, d]; concept, timestep and drawn int64 [M]."""

    x: Tensor
    concept: Tensor
    timestep: Tensor
    drawn: Tensor

    def at(self, chosen: Tensor) -> Patches:
        """Patches by their indices ``chosen`` int64 [N] in all images."""
        image = chosen // self.x.shape[1]
        return Patches(
            x=self.x.flatten(0, 1)[chosen].float(),
            concept=self.concept[image],
            timestep=self.timestep[image],
            drawn=self.drawn[image],
            image_mean=self.mean[image],
        )

    @cached_property
    def mean(self) -> Tensor:
        return self.x.mean(dim=1, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class ActivationCache:
    """Activations of one block on the disk, in shards.

    A shard holds ``activations`` float16 [images, steps, patches, d], ``concept`` [images], ``timestep`` [steps],
    ``map_size`` [2], which is (h, w) of the patches, or [0] if the block's output is a sequence, and ``drawn`` [images]
    as in ``Patches``.

    Attributes:
        shards: Files of activations under the prompts that the images were drawn of.
        crossed: Shards of the same format with the block's output under the prompt of another concept than the one
            that the image is drawn of; ``concept`` is then the prompt's.
        pooled: Number of shards in memory at a time: as many as it takes for all concepts to be among them.
    """

    shards: tuple[Path, ...]
    crossed: tuple[Path, ...] = ()
    pooled: int = 1

    def with_crossed(self) -> ActivationCache:
        """Cache of plain and crossed shards, those of the same images side by side."""
        both = sorted((*self.shards, *self.crossed), key=lambda shard: shard.name.partition("-")[2])
        return ActivationCache(tuple(both), pooled=2 * self.pooled)

    def shard_patches(self, shard: int) -> int:
        with safe_open(self.shards[shard], "pt") as file:
            images, steps, patches, _ = file.get_slice("activations").get_shape()
        return int(images * steps * patches)

    def read(self, shard: int) -> Patches:
        stored = self._stored([shard])
        return stored.at(torch.arange(stored.x.shape[0] * stored.x.shape[1]))

    def images(self, shard: int) -> Images:
        tensors = load_file(self.shards[shard])
        return Images(tensors["activations"], tensors["concept"], tensors["timestep"], tensors["drawn"])

    def map_size(self) -> tuple[int, ...]:
        """(h, w) of the block's maps, () where its output is a sequence."""
        return tuple(load_file(self.shards[0])["map_size"].tolist())

    def batches(self, batch_size: int, seed: int, epochs: int, start: int = 0) -> Iterator[Patches]:
        """Batches of shuffled patches from batch ``start`` on: pools of shards in an order, and the patches of a pool.

        The order is a function of (seed, epoch), so a resumed run sees what it would have seen. What is left over of a
        pool is left out of the epoch.
        """
        pools = self._pools()
        passed = 0
        for epoch in range(epochs):
            for number in shuffled(len(pools), seed, epoch, 0).tolist():
                total = sum(self.shard_patches(shard) for shard in pools[number])
                count = total // batch_size
                if passed + count <= start:
                    passed += count
                    continue
                pool = self._stored(pools[number])
                order = shuffled(total, seed, epoch, 1 + number)
                for batch in range(max(0, start - passed), count):
                    yield pool.at(order[batch * batch_size : (batch + 1) * batch_size])
                passed += count

    def _stored(self, shards: Sequence[int]) -> _Stored:
        read = [self.images(shard) for shard in shards]
        # An image has as many rows as steps.
        return _Stored(
            x=torch.cat([images.x.flatten(0, 1) for images in read]),
            concept=torch.cat([images.concept.repeat_interleave(len(images.timestep)) for images in read]),
            timestep=torch.cat([images.timestep.repeat(len(images.concept)) for images in read]),
            drawn=torch.cat([images.drawn.repeat_interleave(len(images.timestep)) for images in read]),
        )

    def batch_count(self, batch_size: int, epochs: int) -> int:
        return epochs * sum(sum(map(self.shard_patches, pool)) // batch_size for pool in self._pools())

    def _pools(self) -> list[range]:
        """Ranges of neighbouring shards, among which concepts take turns."""
        count = len(self.shards)
        return [range(first, min(first + self.pooled, count)) for first in range(0, count, self.pooled)]


def shuffled(count: int, seed: int, epoch: int, stream: int) -> Tensor:
    """Permutation of 0 .. count - 1 addressed by (seed, epoch, stream)."""
    ids = (torch.arange(count) << 20) | stream
    return philox_bits(ids, noise_key(seed, epoch, "cpu"), int(NoiseRole.ORDER), 1)[:, 0].argsort(stable=True)


def collect_activations(
    model: Any,
    block: str,
    concepts: Sequence[Sequence[str]],
    folder: Path,
    *,
    images_per_concept: int,
    num_inference_steps: int,
    guidance_scale: float,
    crossed: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    progress: Any = None,
) -> ActivationCache:
    """Sample images of each concept and cache the conditional output of ``block``.

    The folder within ``folder`` is named by a hash of model, block, prompts and sampling, so another model never reads
    it. Shards that exist are not made again: a killed run continues. Of the two halves of classifier-free guidance the
    conditional one is cached; without guidance there is only that one.

    Args:
        model: Text-to-image model.
        block: Name of the block within the denoiser.
        concepts: Prompts of each concept, taken in turn. Concepts take turns as well, so that a shard holds many: a
            batch of one concept has no negatives for supervision.
        folder: Cache directory.
        images_per_concept: Number of images of each concept.
        num_inference_steps: Sampling steps per image.
        guidance_scale: Scale of classifier-free guidance.
        crossed: Also cache, at each step, the output for the same noisy images with their prompts rolled within the
            batch. While a concept is being erased, the prompt says one thing and the image already another, which no
            trajectory of a single prompt shows.
        seed: Seed of the images.
        batch_size: Images per shard.
        progress: Called with the number of images of each shard.

    Raises:
        ValueError: ``crossed`` with batches of one image.
        UserError: More steps than the model has timesteps.
    """
    model.process.check_inference_steps(num_inference_steps)
    if crossed and batch_size == 1:
        raise ValueError("prompts change places within a batch: with one image there is no other")
    identity = {
        "network": model.denoiser_hash(),
        "encoders": model.hash,
        "scheduler": str(model.scheduler.config),
        "block": block,
        "concepts": [list(prompts) for prompts in concepts],
        "sampling": [images_per_concept, num_inference_steps, guidance_scale, seed, batch_size, crossed],
    }
    cache_dir = folder / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    cache_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(cache_dir / "asked.json", json.dumps(identity, indent=1))
    drawn = [
        (number, prompts[image % len(prompts)])
        for image in range(images_per_concept)
        for number, prompts in enumerate(concepts)
    ]
    shards, others = [], []
    for number, first in enumerate(range(0, len(drawn), batch_size)):
        part = drawn[first : first + batch_size]
        shard, other = (cache_dir / f"{kind}-{first:07d}.safetensors" for kind in ("shard", "crossed"))
        # The last batch may hold a single image.
        shift = 1 + number % (len(part) - 1) if crossed and len(part) > 1 else 0
        shards.append(shard)
        others += [other] if shift else []
        if not shard.exists():
            numbers, prompts = zip(*part, strict=True)
            plain, rolled = _record(model, block, prompts, num_inference_steps, guidance_scale, seed + first, shift)
            concept = torch.tensor(numbers)
            # The one that is looked for comes last.
            if shift:
                _write(other, rolled | {"concept": concept.roll(shift), "drawn": concept})
            _write(shard, plain | {"concept": concept, "drawn": concept.clone()})
        if progress is not None:
            progress(len(part))
    return ActivationCache(tuple(shards), tuple(others), pooled=-(-len(concepts) // batch_size))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as partial:
        save_file(tensors, partial)


def _record(
    model: Any, block: str, prompts: Sequence[str], steps: int, guidance_scale: float, seed: int, shift: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the sampled images, and of the same images under prompts rolled by ``shift`` (0: empty)."""
    network: nn.Module = model.denoiser
    outputs: dict[bool, list[Tensor]] = {False: [], True: []}
    timesteps: list[Tensor] = []
    rolled = False
    size: tuple[int, ...] = ()

    def record(x: Tensor, timestep: Tensor) -> None:
        nonlocal size
        size = tuple(x.shape[2:]) if x.dim() == 4 else ()
        outputs[rolled].append(as_patches(x)[-len(prompts) :].detach().to("cpu", torch.float16))
        if not rolled:
            timesteps.append(torch.as_tensor(timestep).detach().reshape(-1)[0].cpu().long())

    def cross(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rolled
        if not rolled:
            rolled = True
            network(*args, **_rolled(kwargs, len(prompts), shift))
            rolled = False

    with ExitStack() as hooks:
        hooks.enter_context(at_block(network, block, record))
        if shift:
            hooks.callback(network.register_forward_pre_hook(cross, with_kwargs=True).remove)
        model.sample(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            batch_size=len(prompts),
        )
    shared = {"timestep": torch.stack(timesteps), "map_size": torch.tensor(size, dtype=torch.int64)}
    plain, crossed = (
        {"activations": torch.stack(x, dim=1).contiguous(), **shared} if x else {} for x in outputs.values()
    )
    return plain, crossed


PROMPT_INPUTS = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "text_embeds")
"""Keyword arguments that carry the prompt in diffusers' networks; SDXL's last one is in ``added_cond_kwargs``."""


def _rolled(kwargs: Mapping[str, Any], rows: int, shift: int) -> dict[str, Any]:
    """Keyword arguments of a call of the network, with the prompts of the last ``rows`` rows rolled by ``shift``."""
    changed = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, dict):
            changed[name] = _rolled(value, rows, shift)
        elif name in PROMPT_INPUTS and isinstance(value, Tensor):
            changed[name] = torch.cat([value[:-rows], value[-rows:].roll(shift, dims=0)])
    return changed
