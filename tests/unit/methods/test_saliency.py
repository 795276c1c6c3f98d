"""SalUn's mask: an exact threshold without a sort, and weights outside it that do not move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erasediff import EraseDiff
from erasediff.methods.salun import forget_gradients, saliency_threshold, set_saliency_mask
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select, train_only
from erasediff_kernels import ConstrainedAdamW

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_threshold_is_the_order_statistic(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    share = data.draw(st.floats(0.01, 1.0))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scale = data.draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e20]))
    gradients = [torch.randn(size, generator=generator) * scale for size in sizes]
    if data.draw(st.booleans()):
        gradients[0].zero_()
    magnitudes = torch.cat(gradients).abs().sort(descending=True).values
    assert saliency_threshold(gradients, share) == magnitudes[max(1, round(share * len(magnitudes))) - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_threshold_of_half_types(dtype: torch.dtype) -> None:
    gradient = torch.randn(1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert saliency_threshold([gradient], 0.5) == gradient.float().abs().sort(descending=True).values[499]


def test_padding_of_a_shard_is_below_everything() -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(0))
    padded = [torch.cat([values, torch.zeros(100)])]
    assert saliency_threshold(padded, 0.4, count=300) == saliency_threshold([values], 0.4)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1])
def test_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        saliency_threshold([torch.ones(3)], share)


def test_only_salient_weights_move(nano: Any, nano_folder: Callable[[str], Path]) -> None:
    model: Any = load_text_to_image(nano_folder("sd"))
    module = model.denoiser
    parameters = train_only(module, select(module, "xattn"))
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    condition = model.encode_prompts(["a dog"] * 2)
    batches = [{"sample": torch.randn(2, 4, 16, 16, generator=generator), **condition} for _ in range(3)]
    optimizer = ConstrainedAdamW(parameters, lr=1e-2)
    unlearner = EraseDiff(module, optimizer, process=model.process, denoiser=model.predict)
    gradients = forget_gradients(unlearner, batches)
    again = forget_gradients(unlearner, batches)
    assert all(torch.equal(own, other) for own, other in zip(gradients, again, strict=True))
    assert all(parameter.grad is None for parameter in parameters)

    moving = set_saliency_mask(unlearner.gradients, gradients, share=0.3)
    assert moving == pytest.approx(0.3, abs=0.01)
    unlearner.step(batches[0], batches[1])
    threshold = saliency_threshold(gradients, 0.3)
    for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
        assert torch.equal(parameter[gradient.abs() < threshold], old[gradient.abs() < threshold])
    changed = sum(int((parameter != old).sum()) for parameter, old in zip(parameters, before, strict=True))
    assert changed > 0.9 * moving * sum(parameter.numel() for parameter in parameters)
