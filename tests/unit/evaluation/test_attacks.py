"""Attacks on a text-to-image model: a word's own vector changes nothing, and attacks find what minimises the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erasediff.diffusion import DenoisingObjective, micro_batches, noise_key
from erasediff.errors import UserError
from erasediff.evaluation.attacks import (
    PromptSearch,
    condition,
    embeddings,
    in_place_of,
    textual_inversion,
    token_ids,
    word_id,
)
from erasediff.models.load import load_text_to_image
from erasediff.models.stable_diffusion import StableDiffusion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sd(nano_folder: Callable[[str], Path]) -> StableDiffusion:
    model = load_text_to_image(nano_folder("sd"))
    assert isinstance(model, StableDiffusion)
    return model


@pytest.fixture
def latents(sd: StableDiffusion) -> torch.Tensor:
    shape = sd.latent_shape(*sd.default_size)
    return torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))


def loss(model: StableDiffusion, latents: torch.Tensor, prompt: str) -> float:
    objective = DenoisingObjective(process=model.process, denoiser=model.predict)
    batch = {"sample": latents, "sample_ids": torch.arange(len(latents))}
    with torch.no_grad():
        batch |= condition(model, token_ids(model, prompt), len(latents))
        part, weight = micro_batches(batch)[0]
        return float(objective.retain_loss(model.denoiser, part, weight, key=noise_key(7, 0, "cpu")))


def test_the_condition_is_the_pipelines(sd: StableDiffusion) -> None:
    theirs = sd.encode_prompts(["a cat"])["encoder_hidden_states"]
    ours = condition(sd, token_ids(sd, "a cat"), 1)["encoder_hidden_states"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_words_own_vector_changes_nothing_and_another_reaches_the_sampler(sd: StableDiffusion) -> None:
    def drawn() -> torch.Tensor:
        return sd.sample(["a"], num_inference_steps=2, guidance_scale=7.5)

    plain, own = drawn(), embeddings(sd)[word_id(sd, "a")].clone()
    with in_place_of(sd, "a", own):
        assert torch.equal(drawn(), plain)
    with in_place_of(sd, "a", 50 * torch.ones_like(own)):
        assert not torch.equal(drawn(), plain)
    assert torch.equal(drawn(), plain), "the vector leaves with the block"


def test_an_inverted_word_denoises_the_images_better_and_changes_no_weight(
    sd: StableDiffusion, latents: torch.Tensor
) -> None:
    before = sd.denoiser_hash()
    own = loss(sd, latents, "a")
    vector = textual_inversion(sd, latents, "a", "a", steps=40, lr=0.1, batch_size=8)
    with in_place_of(sd, "a", vector):
        assert loss(sd, latents, "a") < own
    assert sd.denoiser_hash() == before


def test_a_word_must_be_one_token_of_the_prompt(sd: StableDiffusion, latents: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not in the prompt"):
        textual_inversion(sd, latents, "a", "b", steps=1)
    with pytest.raises(UserError, match="tokens to this text encoder"):
        word_id(sd, "unheard-of")


def test_the_search_finds_the_best_of_a_small_vocabulary(sd: StableDiffusion, latents: torch.Tensor) -> None:
    # The differences between the words of an untrained model drown in chance unless they are made larger.
    with torch.no_grad():
        embeddings(sd).mul_(100)
    vocabulary = ["a", "b", "c", "d"]
    search = PromptSearch(sd, latents, vocabulary, batch_size=8, seed=0)
    found = search.search("e", words=1, steps=4, candidates=4)
    losses = {f"{word} e": search._loss(f"{word} e", 4) for word in vocabulary}
    assert found.prompt in losses
    assert found.loss == losses[found.prompt] <= sorted(losses.values())[1]
    assert found.unattacked_loss == search._loss("e", 4)
