"""Attacks on a text-to-image model: a word's own vector changes nothing, and attacks find what minimises the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from nano import SIZE

from erasediff.diffusion import DenoisingObjective, micro_batches, noise_key
from erasediff.errors import UserError
from erasediff.evaluation.attacks import (
    PromptSearch,
    condition,
    in_place_of,
    single_token,
    single_token_words,
    textual_inversion,
)
from erasediff.models.base import LatentModel
from erasediff.models.load import load_text_to_image
from erasediff.models.text_tokens import hook_token_embeddings, positions_of, text_encoders

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sd(nano_folder: Callable[[str], Path]) -> LatentModel:
    return load_text_to_image(nano_folder("sd"))


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux"])
def model(nano_folder: Callable[[str], Path], request: pytest.FixtureRequest) -> LatentModel:
    return load_text_to_image(nano_folder(request.param))


def latents_of(model: LatentModel, count: int = 8) -> torch.Tensor:
    shape = model.latent_shape(SIZE, SIZE)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def latents(sd: LatentModel) -> torch.Tensor:
    return latents_of(sd)


def loss(model: LatentModel, latents: torch.Tensor, prompt: str) -> float:
    objective = DenoisingObjective(process=model.process, denoiser=model.predict)
    batch = {"sample": latents, "sample_ids": torch.arange(len(latents))}
    with torch.no_grad():
        batch |= condition(model, prompt, latents)
        part, weight = micro_batches(batch)[0]
        return float(objective.retain_loss(model.denoiser, part, weight, key=noise_key(7, 0, "cpu")))


def test_gradients_reach_the_tokens_of_every_encoder(model: LatentModel) -> None:
    embedded = {}

    def leaf(encoder: str, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        embedded[encoder] = output.detach().requires_grad_()
        return embedded[encoder]

    with hook_token_embeddings(model, leaf):
        sum(value.square().sum() for value in model.embed_prompts(["a"]).values()).backward()
    assert list(embedded) == model.encoder_names
    for encoder in text_encoders(model):
        place = positions_of(encoder.ids("a"), encoder.word("a"))[0, :, -1].nonzero()[0, 0]
        assert place == encoder.first + len(encoder.word("a")) - 1
        assert embedded[encoder.name].grad[0, place].any()


def test_own_vectors_change_nothing_and_others_reach_the_sampler(model: LatentModel) -> None:
    def drawn() -> torch.Tensor:
        return model.sample(["a cat"], num_inference_steps=2, height=SIZE, width=SIZE)

    plain = drawn()
    own = {e.name: e.weight[torch.tensor(e.word("cat"))].clone() for e in text_encoders(model)}
    assert all(len(vectors) > 1 for vectors in own.values()), "a word of several tokens"
    with in_place_of(model, "cat", own):
        assert torch.equal(drawn(), plain)
    with in_place_of(model, "cat", {name: 50 * torch.ones_like(vectors) for name, vectors in own.items()}):
        assert not torch.equal(drawn(), plain)
    assert torch.equal(drawn(), plain), "the vectors leave with the block"


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_an_inverted_word_denoises_the_images_better_and_changes_no_weight(
    model: LatentModel, tokens: Literal["last", "all"]
) -> None:
    before, latents = model.denoiser_hash(), latents_of(model)
    own = loss(model, latents, "a cat")
    vectors = textual_inversion(model, latents, "a cat", "cat", tokens=tokens, steps=25, lr=0.1, batch_size=8)
    with in_place_of(model, "cat", vectors):
        assert loss(model, latents, "a cat") < own
    assert model.denoiser_hash() == before
    assert list(vectors) == model.encoder_names


def test_an_inverted_word_can_start_from_another(sd: LatentModel, latents: torch.Tensor) -> None:
    [encoder] = text_encoders(sd)
    vectors = textual_inversion(sd, latents, "a cat", "cat", start="dog", tokens="all", steps=0)
    torch.testing.assert_close(vectors["text_encoder"], encoder.weight[torch.tensor(encoder.word("dog"))])


def test_a_word_must_stand_in_the_prompt(sd: LatentModel, latents: torch.Tensor) -> None:
    with pytest.raises(UserError, match='finds no word "b" in the prompt "a"'):
        textual_inversion(sd, latents, "a", "b", steps=1)
    with pytest.raises(UserError, match="tokens to the text_encoder"):
        single_token(text_encoders(sd)[0], "unheard-of")


def test_words_of_one_token_are_so_to_every_encoder(model: LatentModel) -> None:
    words = single_token_words(model, shortest=1)
    # The nano T5 reads "a" as a space and a letter.
    assert words == [] if model.family in ("sd3", "flux") else {"a", "b", "c"} <= set(words)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_search_finds_the_best_of_a_small_vocabulary(nano_folder: Callable[[str], Path], family: str) -> None:
    sd = load_text_to_image(nano_folder(family))
    latents = latents_of(sd)
    # The differences between the words of an untrained model drown in chance unless they are made larger.
    with torch.no_grad():
        for encoder in text_encoders(sd):
            encoder.weight.mul_(100)
    vocabulary = ["a", "b", "c", "d"]
    search = PromptSearch(sd, latents, vocabulary, batch_size=8, seed=0)
    found = search.search("e", words=1, steps=4, candidates=4)
    losses = {f"{word} e": search._loss(f"{word} e", 4) for word in vocabulary}
    assert found.prompt in losses
    assert found.loss == losses[found.prompt] <= sorted(losses.values())[1]
    assert found.unattacked_loss == search._loss("e", 4)
