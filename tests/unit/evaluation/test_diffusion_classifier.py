"""The diffusion classifier finds the condition under which a planted denoiser predicts the noise exactly."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from erasediff.diffusion.noise_schedule import Process
from erasediff.evaluation.diffusion_classifier import DiffusionClassifier

CONDITIONS = 7


class Planted(nn.Module):
    """Under condition k, the noise of a noisy ``images[k]``, exactly: (x - alpha image) / sigma."""

    def __init__(self, images: Tensor, process: Process) -> None:
        super().__init__()
        self.images, self.process = nn.Parameter(images), process
        self.calls = 0

    def predict(self, _: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.calls += len(noisy_sample)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in self.process.coefficients(timesteps))
        return (noisy_sample - alpha * self.images[condition["number"]]) / sigma


@pytest.fixture
def planted() -> Planted:
    process = Process.from_scheduler(DDPMScheduler(num_train_timesteps=100))
    return Planted(torch.randn(CONDITIONS, 1, 3, 3, generator=torch.Generator().manual_seed(0)), process)


def classifier(planted: Planted, **options: int) -> DiffusionClassifier:
    return DiffusionClassifier(planted, planted.process, planted.predict, **options)


@pytest.mark.parametrize("count", [2, 4, 5, CONDITIONS])
def test_each_image_is_of_its_own_condition(planted: Planted, count: int) -> None:
    conditions = {"number": torch.arange(count)}
    seen = classifier(planted, batch_size=3).classify(planted.images[:count].detach(), conditions)
    assert seen.tolist() == list(range(count))


def test_an_image_of_none_is_of_the_nearest(planted: Planted) -> None:
    # The error is (alpha / sigma)^2 |x - image_k|^2, relative to its mean over k: the nearest image's is the least.
    samples = torch.randn(20, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(samples.flatten(1), planted.images.detach()[:4].flatten(1)).argmin(1)
    assert torch.equal(classifier(planted).classify(samples, {"number": torch.arange(4)}), nearest)


def test_passes_are_counted_and_batches_do_not_matter(planted: Planted) -> None:
    samples, conditions = planted.images.detach(), {"number": torch.arange(CONDITIONS)}
    counted: list[int] = []
    first = classifier(planted, batch_size=5)
    answers = first.classify(samples, conditions, counted.append)
    # Two draws with all, eight with the best four.
    assert sum(counted) == planted.calls == first.passes(CONDITIONS, CONDITIONS) == CONDITIONS * (2 * 7 + 8 * 4)
    assert torch.equal(answers, classifier(planted, batch_size=64).classify(samples, conditions))
    with pytest.raises(ValueError, match="draws"):
        classifier(planted, draws=0)
