"""Sparse autoencoders: training on planted concepts, and erasing on a nano Stable Diffusion under any sampler."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor

from erasediff.errors import UserError
from erasediff.models.family import TextToImageModel
from erasediff.models.load import load_text_to_image
from erasediff.sae import (
    ActivationCache,
    ConceptEraser,
    Features,
    SaeTraining,
    SparseAutoencoder,
    Supervision,
    assign_latents,
    collect_activations,
    measure_features,
    train_autoencoder,
)
from erasediff.sae.eraser import EditReport, concept_free
from erasediff.sae.training import geometric_median, squared_correlation

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = "up_blocks.1.attentions.0"
PROMPTS = ["a cat", "a dog", "a sofa"]
SETTINGS = SaeTraining(epochs=6, batch_size=64, lr=3e-3, dead_after=500, checkpoint_every=5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Three concepts, each a direction of its own on top of eight that all share, at two timesteps."""
    folder = tmp_path_factory.mktemp("planted")
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    shards = []
    for number in range(3):
        concept = torch.tensor([0, 1, 2])
        weights = torch.rand(3, 2, 40, 8, generator=generator)
        x = (weights * (weights > 0.6)) @ directions[:8]
        x += 3 * directions[8 + concept][:, None, None]
        shards.append(folder / f"shard-{number}.safetensors")
        save_file({"activations": x.half(), "concept": concept, "timestep": torch.tensor([900, 100])}, shards[-1])
    return ActivationCache(tuple(shards))


def trained(cache: ActivationCache, epochs: int = 6, checkpoint: Path | None = None) -> SparseAutoencoder:
    autoencoder = SparseAutoencoder(16, 48, 6, seed=3)
    train_autoencoder(autoencoder, cache, dataclasses.replace(SETTINGS, epochs=epochs), checkpoint=checkpoint)
    return autoencoder


def eraser_of(autoencoder: SparseAutoencoder, cache: ActivationCache, block: str = BLOCK) -> ConceptEraser:
    features = measure_features(autoencoder, cache, 3)
    bank, limit = concept_free(autoencoder, cache, features.timesteps, (0,), 32)
    return ConceptEraser(
        autoencoder=autoencoder.requires_grad_(False),
        block=block,
        concepts=tuple(PROMPTS),
        assigned=assign_latents(features),
        erased=(0,),
        features=features,
        bank=bank,
        limit=limit,
    )


@pytest.fixture(scope="module")
def planted_eraser(planted: ActivationCache) -> ConceptEraser:
    return eraser_of(trained(planted, 30), planted)


def test_gradients_are_those_of_the_dense_autoencoder() -> None:
    autoencoder = SparseAutoencoder(7, 20, 3).double()
    x = torch.randn(5, 7, dtype=torch.float64)
    parameters = list(autoencoder.parameters())
    ours = torch.autograd.grad((autoencoder(x) - x).square().sum(), parameters)
    z = ((x - autoencoder.b_dec) @ autoencoder.W_enc.T + autoencoder.b_enc).relu()
    kept = torch.zeros_like(z).scatter(1, z.topk(3).indices, 1.0)
    dense = torch.autograd.grad(((z * kept) @ autoencoder.W_dec + autoencoder.b_dec - x).square().sum(), parameters)
    for gradient, expected in zip(ours, dense, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_training_explains_the_activations_and_keeps_rows_of_norm_one(planted: ActivationCache) -> None:
    before = train_autoencoder(SparseAutoencoder(16, 48, 6), planted, dataclasses.replace(SETTINGS, epochs=1))
    autoencoder = SparseAutoencoder(16, 48, 6)
    after = train_autoencoder(autoencoder, planted, dataclasses.replace(SETTINGS, epochs=30, lr=1e-2))
    assert after["fvu"] < 0.1 < before["fvu"]
    torch.testing.assert_close(autoencoder.W_dec.norm(dim=1), torch.ones(48))


def test_a_killed_training_goes_on_to_the_same_weights(planted: ActivationCache, tmp_path: Path) -> None:
    whole = trained(planted)
    killed = 0

    def kill(_: int) -> None:
        nonlocal killed
        killed += 1
        if killed == 13:
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(SparseAutoencoder(16, 48, 6, seed=3), planted, SETTINGS, checkpoint=state, progress=kill)
    again = trained(planted, checkpoint=state)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_dead_latents_are_revived(planted: ActivationCache) -> None:
    def dead(auxiliary: float) -> float:
        autoencoder = SparseAutoencoder(16, 48, 6)
        autoencoder.b_enc.data[24:] = -1.0
        settings = dataclasses.replace(SETTINGS, epochs=15, auxiliary=auxiliary, lr=1e-2)
        return train_autoencoder(autoencoder, planted, settings)["dead"]

    assert dead(1.0) < dead(0.0)


def test_supervision_ties_each_concept_to_its_latent(planted: ActivationCache) -> None:
    autoencoder = trained(planted)
    assigned = torch.tensor([40, 41, 42])
    train_autoencoder(
        autoencoder,
        planted,
        dataclasses.replace(SETTINGS, epochs=25, lr=1e-2),
        supervision=Supervision(assigned=assigned, weight=1.0),
    )
    patches = planted.read(0)
    logits = autoencoder.preactivations(patches.x)[:, assigned]
    expected = patches.concept[:, None] == torch.arange(3)
    assert ((logits > 0) == expected).float().mean() > 0.99
    assert torch.equal(assign_latents(measure_features(autoencoder, planted, 3)), assigned)


def test_scores_and_assignment() -> None:
    mean = torch.tensor([[[4.0, 1.0, 0.0], [1.0, 1.0, 3.0]]])
    scores = Features(mean, torch.tensor([5])).scores()
    torch.testing.assert_close(scores[0, 0], torch.tensor([4 / 5 - 1 / 5, 1 / 5 - 1 / 5, -3 / 5]))
    torch.testing.assert_close(scores[0, 1], -scores[0, 0])
    same = Features(torch.tensor([[[4.0, 1.0, 0.0], [3.0, 1.5, 0.0], [0.0, 0.0, 9.0]]]), torch.tensor([5]))
    assert sorted(assign_latents(same).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="two"):
        Features(mean[:, :1], torch.tensor([5])).scores()


def test_small_mathematics() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]])
    assert geometric_median(points).abs().max() < 1e-3
    x = torch.randn(50, 3)
    expected = (torch.corrcoef(x.T).square().sum() - 3) / 6
    torch.testing.assert_close(squared_correlation(x), expected)
    assert squared_correlation(x[:, :1]) == 0


@pytest.fixture
def model(nano_folder: Callable[[str], Path]) -> TextToImageModel:
    return load_text_to_image(nano_folder("sd"))


def cache_of(model: TextToImageModel, folder: Path, guidance: float = 3.0) -> ActivationCache:
    return collect_activations(
        model, BLOCK, PROMPTS, folder, images_per_prompt=2, num_inference_steps=3, guidance_scale=guidance
    )


def test_cache_is_made_once_for_a_model_and_its_prompts(model: TextToImageModel, tmp_path: Path) -> None:
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
    assert patches.concept.unique().tolist() == [0, 1]


@pytest.fixture
def eraser(model: TextToImageModel, tmp_path: Path) -> ConceptEraser:
    cache = cache_of(model, tmp_path / "cache")
    return eraser_of(trained(cache, 1), cache)


def draw(model: TextToImageModel, eraser: ConceptEraser | None = None, **options: int | float) -> Tensor:
    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "batch_size": 2, **options}
    if eraser is None:
        return model.sample(PROMPTS[:2], **arguments)
    with eraser.attached(model.denoiser_module):
        return model.sample(PROMPTS[:2], **arguments)


def test_attaching_erases_and_detaching_restores(model: TextToImageModel, eraser: ConceptEraser) -> None:
    before = draw(model)
    steered = dataclasses.replace(eraser, intervention="steer", strength=-20.0)
    assert not torch.equal(draw(model, steered), before)
    assert torch.equal(draw(model), before)
    assert torch.equal(draw(model, eraser.erasing([])), before)
    handle = steered.attach(model.denoiser_module)
    assert not torch.equal(draw(model), before)
    handle.close()
    assert torch.equal(draw(model), before)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler], ids=lambda s: s.__name__)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_any_scheduler_any_guidance_any_size(
    model: TextToImageModel, eraser: ConceptEraser, scheduler: type, guidance: float
) -> None:
    model.scheduler = scheduler.from_config(model.scheduler.config)
    assert draw(model, eraser, guidance_scale=guidance, num_inference_steps=4, height=32, width=48).shape[1:3] == (
        32,
        48,
    )


def test_only_patches_with_the_concept_change(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    patches = planted.read(0)
    at_100 = patches.timestep == 100
    x, concept = patches.x[at_100], patches.concept[at_100]
    for intervention in ("steer", "replace"):
        edited = dataclasses.replace(planted_eraser, intervention=intervention).edit(x[None], torch.tensor(101))[0]
        changed = (edited != x).any(dim=1)
        assert changed[concept == 0].float().mean() > 0.95
        assert changed[concept != 0].float().mean() < 0.05


def test_replaced_patches_are_real_and_no_artifacts(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    patches = planted.read(0)
    x = patches.x[(patches.timestep == 900) & (patches.concept == 0)]
    rates = {}
    for strength, intervention in ((-1.0, "replace"), (-30.0, "steer")):
        report = EditReport()
        edited = dataclasses.replace(planted_eraser, intervention=intervention, strength=strength).edit(
            x[None], torch.tensor(900), report
        )[0]
        rates[intervention] = report.artifact_rate
        if intervention == "replace":
            place = planted_eraser.features.timesteps.tolist().index(900)
            changed = edited[(edited != x).any(dim=1)]
            assert torch.cdist(changed, planted_eraser.bank[place].float()).min(dim=1).values.max() < 1e-2
    assert rates["replace"] <= 0.05 < rates["steer"]


def test_several_concepts_at_once_and_one_after_another(
    planted: ActivationCache, planted_eraser: ConceptEraser
) -> None:
    eraser = dataclasses.replace(planted_eraser, intervention="steer", strength=0.0)
    x, time = planted.read(0).x[None], torch.tensor(100)
    both = eraser.erasing(PROMPTS[:2]).edit(x, time)
    one_by_one = eraser.erasing(PROMPTS[1:2]).edit(eraser.erasing(PROMPTS[:1]).edit(x, time), time)
    for edited in (both, one_by_one):
        code = eraser.autoencoder.encode(edited[0])
        left = (code.values * torch.isin(code.indices, eraser.assigned[:2])).sum()
        before = eraser.autoencoder.encode(x[0])
        assert left < 0.05 * (before.values * torch.isin(before.indices, eraser.assigned[:2])).sum()
    with pytest.raises(UserError, match="No latent"):
        eraser.erasing(["a bird"])


def test_saved_and_loaded(planted: ActivationCache, planted_eraser: ConceptEraser, tmp_path: Path) -> None:
    eraser = planted_eraser
    eraser.save(tmp_path / "eraser")
    loaded = ConceptEraser.load(tmp_path / "eraser")
    x = planted.read(0).x[None]
    assert torch.equal(loaded.edit(x, torch.tensor(500)), eraser.edit(x, torch.tensor(500)))
    assert (loaded.concepts, loaded.erased, loaded.block) == (eraser.concepts, eraser.erased, eraser.block)
    with pytest.raises(UserError, match="exists"):
        eraser.save(tmp_path / "eraser")
    described = json.loads((tmp_path / "eraser" / "concepts.json").read_text())
    (tmp_path / "eraser" / "concepts.json").write_text(json.dumps({**described, "erased": ["a bird"]}))
    with pytest.raises(UserError, match="no concept eraser"):
        ConceptEraser.load(tmp_path / "eraser")


def test_a_block_that_is_not_there(model: TextToImageModel, eraser: ConceptEraser) -> None:
    with pytest.raises(UserError, match="no block"):
        draw(model, dataclasses.replace(eraser, block="up_blocks.7"))
