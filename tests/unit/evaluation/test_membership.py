"""Membership inference: losses per image, and the AUC of telling members by them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erasediff.diffusion import NoiseRole, Process, noise_key
from erasediff.evaluation import memorization
from erasediff.evaluation.memorization import image_losses, membership_auc, sample_losses
from erasediff_kernels import denoising_loss, philox_noise

TIMESTEPS = 100


def process(prediction_type: str) -> Process:
    alpha = torch.linspace(0.999, 0.01, TIMESTEPS, dtype=torch.float64).sqrt()
    return Process(
        alpha.float(), (1 - alpha**2).sqrt().float(), prediction_type, torch.arange(TIMESTEPS, dtype=torch.float32)
    )


class Zero(nn.Module):
    def forward(self, noisy_sample: Tensor, timesteps: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros_like(noisy_sample),)


class Knows(nn.Module):
    """Predicts the exact noise in noisy versions of one image, whatever it is shown."""

    def __init__(self, image: Tensor, process: Process) -> None:
        super().__init__()
        self.image, self.process = image, process

    def forward(self, noisy_sample: Tensor, timesteps: Tensor, return_dict: bool) -> tuple[Tensor]:
        alpha, sigma = self.process.coefficients(timesteps.long())
        return ((noisy_sample - alpha.view(-1, 1, 1, 1) * self.image) / sigma.view(-1, 1, 1, 1),)


def images(count: int) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_losses_are_those_of_each_image_by_itself(prediction_type: str) -> None:
    used, sample, draws = process(prediction_type), images(5), 4
    losses = image_losses(Zero(), {"sample": sample}, process=used, draws=draws, seed=3)
    expected = torch.zeros(5, dtype=torch.float64)
    for draw, t in enumerate((12, 37, 62, 87)):
        noise = philox_noise(torch.arange(5), noise_key(3, draw, "cpu"), int(NoiseRole.MEMBERSHIP), (4, 8, 8)).double()
        alpha, sigma = used.alpha[t].double(), used.sigma[t].double()
        x = sample.double()
        target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x, "sample": x}[prediction_type]
        expected += target.square().mean((1, 2, 3)) / draws
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_kernel_gives_the_losses_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch per draw, and the same losses as for each image by itself."""
    used, sample, calls = process("epsilon"), images(5), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[0].shape[0])
        return denoising_loss(*args, **options)

    monkeypatch.setattr(memorization, "denoising_loss", counted)
    losses = image_losses(Zero(), {"sample": sample}, process=used, draws=3)
    assert calls == [5, 5, 5]
    ids = torch.arange(5)
    alone = [
        image_losses(Zero(), {"sample": sample[i : i + 1], "sample_ids": ids[i : i + 1]}, process=used, draws=3)
        for i in range(5)
    ]
    torch.testing.assert_close(losses, torch.cat(alone))
    prediction, target = sample.double(), torch.zeros(5, 4, 8, 8, dtype=torch.float64)
    given = [
        denoising_loss(p[None], p[None], *torch.ones(2, 1), noise=t[None])
        for p, t in zip(prediction, target, strict=True)
    ]
    at_once = denoising_loss(prediction, prediction, *torch.ones(2, 5), noise=target, weight=torch.ones(5))
    expected = torch.stack([each.loss for each in given]).float()
    torch.testing.assert_close(sample_losses(at_once.grad), expected)


def test_an_image_alone_has_the_loss_it_has_among_others() -> None:
    used, sample = process("epsilon"), images(5)
    among = image_losses(Zero(), {"sample": sample}, process=used)
    alone = image_losses(Zero(), {"sample": sample[3:4], "sample_ids": torch.tensor([3])}, process=used)
    assert torch.equal(among[3:4], alone)


def test_what_was_learned_by_heart_is_given_away() -> None:
    used, sample = process("epsilon"), images(40)
    losses = image_losses(Knows(sample[7], used), {"sample": sample}, process=used)
    others = torch.cat((losses[:7], losses[8:]))
    assert losses[7] < 1e-4 < others.min()
    assert membership_auc(losses[7:8], others) == 1.0


def test_auc_counts_pairs() -> None:
    assert membership_auc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])) == 0.75
    assert membership_auc(torch.tensor([1.0]), torch.tensor([1.0, 0.0])) == 0.25
    assert membership_auc(torch.tensor([9.0]), torch.tensor([1.0, 2.0])) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        membership_auc(torch.tensor([]), torch.tensor([1.0]))


def test_draws_must_be_positive() -> None:
    with pytest.raises(ValueError, match="draws"):
        image_losses(Zero(), {"sample": images(1)}, process=process("epsilon"), draws=0)
