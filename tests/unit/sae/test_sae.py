"""Sparse autoencoders: training on planted concepts, and erasing on a nano Stable Diffusion under any sampler."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from erasediff.errors import UserError
from erasediff.models.base import LatentModel
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
from erasediff.sae.activations import Patches
from erasediff.sae.concepts import MeanMaps, calibrate, measure_maps
from erasediff.sae.eraser import Detection, EditReport, Intervention, sample_bank
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
        tensors = {"activations": x.half(), "concept": concept, "timestep": torch.tensor([900, 100])}
        save_file(tensors | {"map_size": torch.tensor([5, 8]), "drawn": concept.clone()}, shards[-1])
    return ActivationCache(tuple(shards))


def trained(cache: ActivationCache, epochs: int = 6, checkpoint: Path | None = None) -> SparseAutoencoder:
    autoencoder = SparseAutoencoder(16, 48, 6, seed=3)
    train_autoencoder(autoencoder, cache, dataclasses.replace(SETTINGS, epochs=epochs), checkpoint=checkpoint)
    return autoencoder


def eraser_of(autoencoder: SparseAutoencoder, cache: ActivationCache, block: str = BLOCK) -> ConceptEraser:
    features = measure_features(autoencoder, cache, 3)
    assigned = assign_latents(features)
    bank, bank_concepts, limit = sample_bank(autoencoder, cache, features.timesteps, 96)
    return ConceptEraser(
        autoencoder=autoencoder.requires_grad_(False),
        block=block,
        concepts=tuple(PROMPTS),
        assigned=assigned,
        erased=(),
        anchors=(),
        features=features,
        thresholds=calibrate(autoencoder, assigned, cache, features.timesteps)[0],
        bank=bank,
        bank_concepts=bank_concepts,
        maps=measure_maps(cache, features.timesteps, 3),
        limit=limit,
    ).erasing(PROMPTS[:1])


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
def model(nano_folder: Callable[[str], Path]) -> LatentModel:
    return load_text_to_image(nano_folder("sd"))


def cache_of(
    model: LatentModel, folder: Path, guidance: float = 3.0, batch_size: int = 4, crossed: bool = False
) -> ActivationCache:
    return collect_activations(
        model,
        BLOCK,
        [[prompt, f"a photo of {prompt}"] for prompt in PROMPTS],
        folder,
        images_per_concept=2,
        num_inference_steps=3,
        guidance_scale=guidance,
        batch_size=batch_size,
        crossed=crossed,
    )


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


@pytest.fixture
def eraser(model: LatentModel, tmp_path: Path) -> ConceptEraser:
    cache = cache_of(model, tmp_path / "cache")
    return eraser_of(trained(cache, 1), cache)


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


@pytest.fixture(params=itertools.product(get_args(Detection), get_args(Intervention)), ids="-".join)
def eraser_of_each_rule(planted_eraser: ConceptEraser, request: pytest.FixtureRequest) -> ConceptEraser:
    detection, intervention = request.param
    return dataclasses.replace(planted_eraser, detection=detection, intervention=intervention)


def test_only_patches_with_the_concept_change(planted: ActivationCache, eraser_of_each_rule: ConceptEraser) -> None:
    x, concept = at(planted, 100)
    edited = eraser_of_each_rule.edit(x, torch.tensor(101))
    changed = (edited != x).any(dim=2)
    assert changed[concept == 0].float().mean() > 0.95
    assert changed[concept != 0].float().mean() < 0.05


def test_the_host_reads_nothing(planted: ActivationCache, eraser_of_each_rule: ConceptEraser) -> None:
    """On tensors without values whatever the host would have to know of them raises, so on a GPU it never waits."""
    x, _ = at(planted, 100)
    maps = x.transpose(1, 2).unflatten(2, (5, 8))
    for output in (x, maps, torch.nn.functional.interpolate(maps, size=(6, 9))):
        eraser_of_each_rule.edit(output, torch.tensor(100), report := EditReport())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            edited = eraser_of_each_rule.edit(mode.from_tensor(output), mode.from_tensor(torch.tensor(100)), report)
            assert edited.shape == output.shape
            with pytest.raises(DataDependentOutputException):
                report.edited_rate  # noqa: B018


def at(cache: ActivationCache, timestep: int) -> tuple[Tensor, Tensor]:
    """Images [B, patches, d] of the first shard at a timestep, and their concepts."""
    x, concept, timesteps, _ = cache.images(0)
    return x[:, timesteps.tolist().index(timestep)].float(), concept


def test_an_image_is_edited_as_a_whole_or_not_at_all(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    eraser = dataclasses.replace(planted_eraser, intervention="replace")
    x, concept = at(planted, 100)
    # Of an image with the concept in most patches, one patch that has none of it, and the other way about.
    x[concept == 0, 0], x[concept == 1, 0] = x[concept == 1, 0].clone(), x[concept == 0, 0].clone()
    by_image = eraser.edit(x, torch.tensor(100)) != x
    assert by_image[concept == 0].any(dim=2).all()
    assert not by_image[concept != 0].any()
    by_patch = (dataclasses.replace(eraser, detection="patch").edit(x, torch.tensor(100)) != x).any(dim=2)
    assert not by_patch[concept == 0, 0].any()
    assert by_patch[concept == 1, 0].all()


def test_moving_makes_one_concept_of_another(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    eraser = planted_eraser.erasing(PROMPTS[:1], PROMPTS[2:])
    x, concept = at(planted, 100)
    edited = eraser.edit(x, torch.tensor(100))
    code = eraser.autoencoder.encode(edited[concept == 0].flatten(0, 1))
    z = torch.zeros(len(code.values), eraser.autoencoder.latents).scatter(1, code.indices, code.values)
    assert (z[:, eraser.assigned].argmax(dim=1) == 2).float().mean() > 0.95
    place = eraser.features.timesteps.tolist().index(100)
    expected = eraser.maps.mean[place, 2].float() - eraser.maps.mean[place, 0].float()
    torch.testing.assert_close((edited - x)[concept == 0][0], expected)
    # A map of another size is moved by the interpolated means, and a sequence of another length by none.
    maps = x[concept == 0].transpose(1, 2).unflatten(2, (5, 8))
    larger = torch.nn.functional.interpolate(maps, size=(10, 16))
    moved = eraser.edit(larger, torch.tensor(100)) - larger
    assert moved.abs().min() > 0
    torch.testing.assert_close(moved.mean(dim=(2, 3))[0], expected.mean(dim=0), atol=1e-2, rtol=0)
    with pytest.raises(UserError, match="40 patches and this image has 39"):
        eraser.edit(x[:, :39], torch.tensor(100))


def test_gradients_pass_what_is_edited(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    x, concept = at(planted, 100)
    for intervention in ("move", "steer"):
        leaf = x.clone().requires_grad_()
        edited = dataclasses.replace(planted_eraser, intervention=intervention).edit(leaf, torch.tensor(100))
        assert (edited != x)[concept == 0].any()
        (gradient,) = torch.autograd.grad(edited.sum(), leaf)
        assert gradient[concept == 0].abs().max() > 0
        torch.testing.assert_close(gradient[concept != 0], torch.ones_like(x[concept != 0]))


def test_what_takes_the_place(planted_eraser: ConceptEraser) -> None:
    for erased, anchors, expected in (
        (PROMPTS[:2], (), (2, 2)),
        (PROMPTS[:2], PROMPTS[2:], (2, 2)),
        (PROMPTS[:1], PROMPTS[1:2], (1,)),
    ):
        assert planted_eraser.erasing(erased, anchors).anchors == expected
    mean = torch.tensor([[0.0, 5.0, 3.0]])[..., None, None].half()
    assert MeanMaps(mean, ()).nearest((0,)) == (2,)
    assert MeanMaps(mean, ()).nearest((0, 2)) == (1, 1)
    for erased, anchors, said in (
        (PROMPTS[:1], PROMPTS[:1], "cannot be erased"),
        (PROMPTS[:1], PROMPTS[1:], "2 anchors for 1"),
        (PROMPTS[:1], ("a bird",), "No latent"),
    ):
        with pytest.raises(UserError, match=said):
            planted_eraser.erasing(erased, anchors)


def test_the_published_rule_is_the_papers_formula(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    eraser = dataclasses.replace(planted_eraser, detection="published", intervention="published", strength=-2.0)
    x, _ = at(planted, 900)
    autoencoder, place = eraser.autoencoder, eraser.features.timesteps.tolist().index(900)
    latent = int(eraser.assigned[0])
    mu = eraser.features.mean[place, :, latent]
    patches = x.reshape(-1, x.shape[-1])
    code = autoencoder.encode(patches)
    z = torch.zeros(len(patches), autoencoder.latents).scatter(1, code.indices, code.values)
    steered = z.clone()
    steered[:, latent] = torch.where(z[:, latent] > mu.mean(), -2.0 * mu[0] * z[:, latent], z[:, latent])
    expected = steered @ autoencoder.W_dec + autoencoder.b_dec + (patches - autoencoder.decode(code))
    assert (expected - patches).abs().max() > 0.1
    torch.testing.assert_close(eraser.edit(x, torch.tensor(900)), expected.view_as(x))


def test_thresholds_are_where_recall_exceeds_false_positives_most(tmp_path: Path) -> None:
    """Latents that read one number each: the first tells the two concepts apart, the second nothing."""
    autoencoder = SparseAutoencoder(2, 2, 1)
    eye = {"W_enc": torch.eye(2), "b_enc": torch.zeros(2), "W_dec": torch.eye(2), "b_dec": torch.zeros(2)}
    autoencoder.load_state_dict(eye)
    first = torch.tensor([[[5.0, 3.0]], [[-1.0, 2.0]], [[4.0, 4.0]], [[0.0, -2.0]]])
    x = torch.stack([first, torch.ones(4, 1, 2)], dim=-1).half()
    concept = torch.tensor([0, 1, 0, 1])
    tensors = {"activations": x, "concept": concept, "drawn": concept.clone(), "timestep": torch.tensor([7])}
    save_file(tensors, tmp_path / "shard.safetensors")
    cache = ActivationCache((tmp_path / "shard.safetensors",))
    thresholds, patches, images = calibrate(autoencoder, torch.tensor([0, 1]), cache, torch.tensor([7]))
    assert thresholds.patch[0, 0] == 2.5
    assert thresholds.image[0, 0] == (4 + 0.5) / 2
    assert patches.of(0) == images.of(0) == {"recall": 1.0, "false_positives": 0.0, "auc": 1.0}
    assert torch.isinf(thresholds.image[0, 1])
    assert images.of(1) == {"recall": 0.0, "false_positives": 0.0, "auc": 0.5}


def test_a_threshold_lets_no_more_through_than_it_may(tmp_path: Path) -> None:
    autoencoder = SparseAutoencoder(1, 1, 1)
    autoencoder.load_state_dict({name: torch.ones_like(tensor) for name, tensor in autoencoder.state_dict().items()})
    scores = torch.tensor([9.0, 6.0, 5.0, 4.0, 8.0, 3.0, 2.0, 1.0, 7.0])
    concept, drawn = torch.tensor([0] * 4 + [1] * 5), torch.tensor([0] * 4 + [1] * 4 + [0])
    tensors = {"activations": scores.view(9, 1, 1, 1).half(), "concept": concept, "drawn": drawn}
    save_file(tensors | {"timestep": torch.tensor([7])}, tmp_path / "shard.safetensors")
    cache = ActivationCache((tmp_path / "shard.safetensors",))
    found = {
        most: calibrate(autoencoder, torch.tensor([0]), cache, torch.tensor([7]), most)[2].of(0) for most in (0.3, 0.2)
    }
    # The last image, of the concept under another's prompt, is no false positive.
    assert (found[0.3]["recall"], found[0.3]["false_positives"]) == (1.0, 0.25)
    assert (found[0.2]["recall"], found[0.2]["false_positives"]) == (0.25, 0.0)


def test_supervision_of_images_reads_their_means_and_leaves_out_what_is_neither() -> None:
    generator = torch.Generator().manual_seed(0)
    x, whole = torch.randn(2, 5, 4, generator=generator)
    autoencoder, assigned = SparseAutoencoder(4, 8, 2), torch.tensor([3, 6])

    def loss(of_images: bool, drawn: list[int]) -> float:
        batch = Patches(
            x=x,
            concept=torch.tensor([0, 1, 0, 1, 1]),
            timestep=torch.zeros(5),
            drawn=torch.tensor(drawn),
            whole=whole,
        )
        supervision = Supervision(assigned=assigned, whole=of_images, weight=1.0, decorrelation=0.0, sparsity=0.0)
        return supervision.loss(autoencoder, batch, torch.zeros(5, 2)).item()

    def expected(of: Tensor, rows: list[list[int]]) -> float:
        """The mean over concepts of -(mean over its images + mean over the others' in ``rows``) / 2, of 5 images."""
        logits = autoencoder.preactivations(of)[:, assigned].double()
        total = 0.0
        for concept, (own, others) in enumerate(zip(([0, 2], [1, 3, 4]), rows, strict=True)):
            right = torch.cat([logits[own, concept], -logits[others, concept]]).sigmoid().log()
            count = len(own) + len(others)
            total -= count / 2 * (right[: len(own)].mean() + right[len(own) :].mean()).item()
        return total / 10

    assert loss(True, [0, 1, 0, 1, 1]) == pytest.approx(expected(whole, [[1, 3, 4], [0, 2]]), rel=1e-4)
    assert loss(False, [0, 1, 0, 1, 1]) == pytest.approx(expected(x, [[1, 3, 4], [0, 2]]), rel=1e-4)
    # The last image was drawn of concept 0 and is under concept 1's prompt now.
    assert loss(True, [0, 1, 0, 1, 0]) == pytest.approx(expected(whole, [[1, 3], [0, 2]]), rel=1e-4)


def test_patches_come_with_the_mean_of_their_image(planted: ActivationCache) -> None:
    images, patches = planted.images(0), planted.read(0)
    assert torch.equal(patches.x, images.x.float().reshape(-1, 16))
    means = images.x.mean(dim=2, dtype=torch.float32)
    assert torch.equal(patches.whole, means[:, :, None].expand_as(images.x).reshape(-1, 16))
    pairs = {(*x, *mean) for x, mean in zip(patches.x.tolist(), patches.whole.tolist(), strict=True)}
    for batch in ActivationCache(planted.shards[:1]).batches(64, 0, 1):
        assert {(*x, *mean) for x, mean in zip(batch.x.tolist(), batch.whole.tolist(), strict=True)} <= pairs


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


def test_replaced_patches_are_real_and_no_artifacts(planted: ActivationCache, planted_eraser: ConceptEraser) -> None:
    x, concept = at(planted, 900)
    x = x[concept == 0]
    rates = {}
    for strength, intervention in ((-1.0, "replace"), (-30.0, "steer")):
        report = EditReport()
        edited = dataclasses.replace(planted_eraser, intervention=intervention, strength=strength).edit(
            x, torch.tensor(900), report
        )
        rates[intervention] = report.artifact_rate
        if intervention == "replace":
            place = planted_eraser.features.timesteps.tolist().index(900)
            others = planted_eraser.bank[place][planted_eraser.bank_concepts[place] != 0].float()
            assert torch.cdist(edited[0], others).min(dim=1).values.max() < 1e-2
    assert rates["replace"] <= 0.05 < rates["steer"]


def test_what_is_put_in_the_place_is_never_of_an_erased_concept(
    planted: ActivationCache, planted_eraser: ConceptEraser
) -> None:
    eraser = dataclasses.replace(planted_eraser.erasing(PROMPTS[:2]), intervention="replace")
    place = eraser.features.timesteps.tolist().index(100)
    x, concept = at(planted, 100)
    edited = eraser.edit(x[concept < 2], torch.tensor(100)).flatten(0, 1)
    source = torch.cdist(edited, eraser.bank[place].float()).argmin(dim=1)
    assert eraser.bank_concepts[place][source].tolist() == [2] * len(edited)


def test_several_concepts_at_once_and_one_after_another(
    planted: ActivationCache, planted_eraser: ConceptEraser
) -> None:
    eraser = dataclasses.replace(planted_eraser, intervention="steer", strength=0.0)
    x, time = at(planted, 100)[0], torch.tensor(100)
    both = eraser.erasing(PROMPTS[:2]).edit(x, time)
    one_by_one = eraser.erasing(PROMPTS[1:2]).edit(eraser.erasing(PROMPTS[:1]).edit(x, time), time)
    before = eraser.autoencoder.encode(x.flatten(0, 1))
    for edited in (both, one_by_one):
        code = eraser.autoencoder.encode(edited.flatten(0, 1))
        left = (code.values * torch.isin(code.indices, eraser.assigned[:2])).sum()
        assert left < 0.05 * (before.values * torch.isin(before.indices, eraser.assigned[:2])).sum()
    with pytest.raises(UserError, match="No latent"):
        eraser.erasing(["a bird"])
    with pytest.raises(UserError, match="leave one"):
        eraser.erasing(PROMPTS)


def test_saved_and_loaded(planted: ActivationCache, planted_eraser: ConceptEraser, tmp_path: Path) -> None:
    eraser = planted_eraser
    eraser.save(tmp_path / "eraser")
    loaded = ConceptEraser.load(tmp_path / "eraser")
    x, _ = at(planted, 900)
    assert torch.equal(loaded.edit(x, torch.tensor(500)), eraser.edit(x, torch.tensor(500)))
    assert (loaded.concepts, loaded.erased, loaded.block) == (eraser.concepts, eraser.erased, eraser.block)
    assert loaded.erasing(PROMPTS[:2]).anchors == (2, 2)
    with pytest.raises(UserError, match="exists"):
        eraser.save(tmp_path / "eraser")
    described = json.loads((tmp_path / "eraser" / "concepts.json").read_text())
    (tmp_path / "eraser" / "concepts.json").write_text(json.dumps({**described, "erased": ["a bird"]}))
    with pytest.raises(UserError, match="no concept eraser"):
        ConceptEraser.load(tmp_path / "eraser")


def test_a_block_that_is_not_there(model: LatentModel, eraser: ConceptEraser) -> None:
    with pytest.raises(UserError, match="no block"):
        draw(model, dataclasses.replace(eraser, block="up_blocks.7"))
