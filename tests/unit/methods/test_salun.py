"""SalUn: its direction, its mask, and both kinds of model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from erasediff import Process, Relabel
from erasediff.config import Config, load_config
from erasediff.diffusion import DenoisingObjective, micro_batches, noise_key
from erasediff.errors import UserError
from erasediff.methods import Fixed, SalUn
from erasediff.models import PixelModel
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff_kernels import ConstrainedSGD, unpack_mask


def test_the_step_is_along_the_published_loss(
    model: nn.Module,
    make_model: Callable[[], nn.Module],
    process: Process,
    make_batch: Callable[..., dict[str, Tensor]],
) -> None:
    alpha, target = 0.25, Relabel({"class_labels": torch.tensor([0])}, make_model().requires_grad_(False).eval())
    twin, retain, forget = make_model(), make_batch(1), make_batch(2)
    objective, key = DenoisingObjective(process=process), noise_key(0, 0, "cpu")
    (alpha * objective.retain_loss(twin, *micro_batches(retain)[0], key=key)).backward()
    objective.forget_loss(twin, target, *micro_batches(forget)[0], key=key).backward()
    optimizer = ConstrainedSGD(model.parameters(), lr=alpha)
    barrier = Fixed(1 / alpha)
    SalUn(model, optimizer, process=process, barrier=barrier, target=target, max_grad_norm=None).step(retain, forget)
    for moved, published in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved, published - published.grad)


def digits_config(**overrides: object) -> Config:
    named = {
        "device": "cpu",
        "unlearn.method": "salun",
        "unlearn.forget": [3],
        "unlearn.batch_size": 8,
        "salun.batches": 2,
    }
    return load_config(None, named | overrides)


def small_digits_model() -> PixelModel:
    return PixelModel.build(num_classes=10, block_out_channels=(8, 8), seed=1)


@pytest.mark.usefixtures("one_thread")
def test_digits_move_only_under_the_mask() -> None:
    model = small_digits_model()
    session = build_unlearning_job(digits_config(**{"salun.share": 0.25}), model)
    before = [parameter.detach().clone() for parameter in model.unet.parameters()]
    list(session.trial_steps(2))
    moved = total = 0
    for parameter, original in zip(model.unet.parameters(), before, strict=True):
        open_to_move = unpack_mask(session.optimizer.state[parameter]["mask"], parameter)
        assert torch.equal(parameter[~open_to_move], original[~open_to_move])
        moved += int((parameter != original).sum())
        total += parameter.numel()
    assert 0.15 < moved / total <= 0.26


@pytest.mark.usefixtures("one_thread")
def test_a_target_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="relabel"):
        build_unlearning_job(digits_config(**{"unlearn.target": "uniform"}), small_digits_model())


@pytest.mark.usefixtures("one_thread")
def test_text_to_image(nano_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path))
    settings = {
        "unlearn.model": nano_folder("sd"),
        "unlearn.method": "salun",
        "unlearn.batch_size": 2,
        "images.forget_prompts": ["a cat"],
        "images.retain_prompts": ["a dog"],
        "images.images_per_prompt": 2,
        "images.height": 32,
        "images.width": 32,
        "images.bucket_step": None,
        "sample.num_inference_steps": 1,
        "text_to_image.anchor_prompts": ["a dog"],
    }
    session = build_unlearning_job(load_config(None, settings))
    list(session.trial_steps(1))
    assert all("mask" in session.optimizer.state[parameter] for parameter in session.optimizer.parameters_in_order())
