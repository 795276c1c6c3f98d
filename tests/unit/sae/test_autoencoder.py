"""Sparse autoencoders: training on planted concepts, supervision, and resuming."""

import dataclasses
from pathlib import Path

import pytest
import torch
from planted import SETTINGS, trained
from torch import Tensor

from erasediff.errors import RunFailedError
from erasediff.sae import (
    ActivationCache,
    SparseAutoencoder,
    Supervision,
    assign_latents,
    measure_features,
    train_autoencoder,
)
from erasediff.sae.activations import Patches
from erasediff.sae.training import geometric_median, squared_correlation

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_training_that_diverges_is_no_success_and_leaves_no_checkpoint(
    planted: ActivationCache, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    settings = dataclasses.replace(SETTINGS, lr=float("inf"), checkpoint_every=2)
    with pytest.raises(RunFailedError, match=r"diverged within 2 steps: \w+ is not finite"):
        train_autoencoder(SparseAutoencoder(16, 48, 6), planted, settings, checkpoint=state)
    assert not state.exists()


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


def test_small_mathematics() -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]])
    assert geometric_median(points).abs().max() < 1e-3
    x = torch.randn(50, 3)
    expected = (torch.corrcoef(x.T).square().sum() - 3) / 6
    torch.testing.assert_close(squared_correlation(x), expected)
    assert squared_correlation(x[:, :1]) == 0


def test_supervision_of_images_reads_their_means_and_leaves_out_what_is_neither() -> None:
    generator = torch.Generator().manual_seed(0)
    x, image_mean = torch.randn(2, 5, 4, generator=generator)
    autoencoder, assigned = SparseAutoencoder(4, 8, 2), torch.tensor([3, 6])

    def loss(of_images: bool, drawn: list[int]) -> float:
        batch = Patches(
            x=x,
            concept=torch.tensor([0, 1, 0, 1, 1]),
            timestep=torch.zeros(5),
            drawn=torch.tensor(drawn),
            image_mean=image_mean,
        )
        supervision = Supervision(assigned=assigned, per_image=of_images, weight=1.0, decorrelation=0.0, sparsity=0.0)
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

    assert loss(True, [0, 1, 0, 1, 1]) == pytest.approx(expected(image_mean, [[1, 3, 4], [0, 2]]), rel=1e-4)
    assert loss(False, [0, 1, 0, 1, 1]) == pytest.approx(expected(x, [[1, 3, 4], [0, 2]]), rel=1e-4)
    # The last image was drawn of concept 0 and is under concept 1's prompt now.
    assert loss(True, [0, 1, 0, 1, 0]) == pytest.approx(expected(image_mean, [[1, 3], [0, 2]]), rel=1e-4)


def test_patches_come_with_the_mean_of_their_image(planted: ActivationCache) -> None:
    images, patches = planted.images(0), planted.read(0)
    assert torch.equal(patches.x, images.x.float().reshape(-1, 16))
    means = images.x.mean(dim=2, dtype=torch.float32)
    assert torch.equal(patches.image_mean, means[:, :, None].expand_as(images.x).reshape(-1, 16))
    pairs = {(*x, *mean) for x, mean in zip(patches.x.tolist(), patches.image_mean.tolist(), strict=True)}
    for batch in ActivationCache(planted.shards[:1]).batches(64, 0, 1):
        assert {(*x, *mean) for x, mean in zip(batch.x.tolist(), batch.image_mean.tolist(), strict=True)} <= pairs
