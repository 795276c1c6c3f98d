"""Activations of a nano Stable Diffusion, and erasing in it under any sampler."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from planted import BLOCK, PROMPTS, cache_of
from torch import Tensor

from erasediff.errors import UserError
from erasediff.models.base import LatentModel
from erasediff.sae import (
    ActivationCache,
    ConceptEraser,
    collect_activations,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cache_is_made_once_for_a_model_and_its_prompts(model: LatentModel, tmp_path: Path) -> None:
    first = cache_of(model, tmp_path)
    bits = [shard.read_bytes() for shard in first.shards]
    first.shards[0].unlink()
    written = first.shards[1].stat().st_mtime_ns
    again = cache_of(model, tmp_path)
    assert again.shards == first.shards
    assert again.shards[1].stat().st_mtime_ns == written
    assert [shard.read_bytes() for shard in again.shards] == bits
    assert cache_of(model, tmp_path, 1.0).shards != first.shards
    patches = again.read(0)
    assert patches.x.shape[1] == 16
    assert patches.concept.unique().tolist() == [0, 1, 2]
    asked = json.loads((again.shards[0].parent / "asked.json").read_text())
    assert asked["concepts"][1] == ["a dog", "a photo of a dog"]


def draw(model: LatentModel, eraser: ConceptEraser | None = None, **options: int | float) -> Tensor:
    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "batch_size": 2, **options}
    if eraser is None:
        return model.sample(PROMPTS[:2], **arguments)
    with eraser.attached(model.denoiser):
        return model.sample(PROMPTS[:2], **arguments)


def test_attaching_erases_and_detaching_restores(model: LatentModel, eraser: ConceptEraser) -> None:
    before = draw(model)
    steered = dataclasses.replace(eraser, intervention="steer", strength=-20.0)
    assert not torch.equal(draw(model, steered), before)
    assert torch.equal(draw(model), before)
    assert torch.equal(draw(model, eraser.erasing([])), before)
    handle = steered.attach(model.denoiser)
    assert not torch.equal(draw(model), before)
    handle.close()
    assert torch.equal(draw(model), before)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler], ids=lambda s: s.__name__)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_any_scheduler_any_guidance_any_size(
    model: LatentModel, eraser: ConceptEraser, scheduler: type, guidance: float
) -> None:
    model.scheduler = scheduler.from_config(model.scheduler.config)
    assert draw(model, eraser, guidance_scale=guidance, num_inference_steps=4, height=32, width=48).shape[1:3] == (
        32,
        48,
    )


def test_crossed_activations_are_those_of_the_other_prompt(model: LatentModel, tmp_path: Path) -> None:
    """A first step from the same noise: crossed, each image has what its noise gives under another image's prompt."""
    drawn = cache_of(model, tmp_path, crossed=True, batch_size=3)
    x, concept, _, _ = drawn.images(0)
    other, others, _, of = ActivationCache(drawn.crossed).images(0)
    assert concept.tolist() == [0, 1, 2]
    assert (others.tolist(), of.tolist()) == ([2, 0, 1], [0, 1, 2])
    assert not torch.equal(x, other)
    asked = [[[PROMPTS[number]] for number in numbers] for numbers in (concept.tolist(), others.tolist())]
    first, second = (
        collect_activations(
            model,
            BLOCK,
            prompts,
            tmp_path,
            images_per_concept=1,
            num_inference_steps=3,
            guidance_scale=3.0,
            batch_size=3,
        ).images(0)[0]
        for prompts in asked
    )
    torch.testing.assert_close(x[:, 0], first[:, 0])
    torch.testing.assert_close(other[:, 0], second[:, 0])
    assert len(drawn.with_crossed().shards) == 2 * len(drawn.shards)
    with pytest.raises(ValueError, match="batch"):
        cache_of(model, tmp_path, crossed=True, batch_size=1)


def test_batches_hold_all_concepts_whatever_a_shard_holds(model: LatentModel, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path, batch_size=1)
    assert all(len(cache.images(shard).concept) == 1 for shard in range(len(cache.shards)))
    batches = list(cache.batches(64, 0, 2))
    assert len(batches) == cache.batch_count(64, 2) > 2
    assert all(batch.concept.unique().tolist() == [0, 1, 2] for batch in batches)
    again = list(cache.batches(64, 0, 2, start=2))
    assert all(torch.equal(one.x, other.x) for one, other in zip(batches[2:], again, strict=True))


def test_a_block_that_is_not_there(model: LatentModel, eraser: ConceptEraser) -> None:
    with pytest.raises(UserError, match="no block"):
        draw(model, dataclasses.replace(eraser, block="up_blocks.7"))
