"""Pruning: the mask's gradient, what is stored, what it brings back, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from erasediff import Norm, Process
from erasediff.errors import UserError
from erasediff.methods.pruning import PrunedEraseDiff
from erasediff.models.masks import (
    WeightMask,
    add_masks,
    apply_masks,
    load_masks,
    merge_masks,
    save_masks,
    weight_masks,
    without_masks,
)
from erasediff.solver import Fixed
from erasediff_kernels import ConstrainedAdamW

NANO = """
threads: 1
images: {height: 32, width: 32}
unlearn: {steps: 6, batch_size: 2, lr: 1.0}
esd: {num_inference_steps: 4}
run: {log_every: 1, checkpoint_every: 3}
"""


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_the_gradient_is_that_of_the_sigmoid_and_the_value_is_a_bit() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    mask = WeightMask(weight, 1.0).double()
    with torch.no_grad():
        mask.score[0] = -0.5
    out = mask(weight)
    assert torch.equal(out[0], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(out[1:], weight[1:])
    incoming = torch.randn_like(weight)
    out.backward(incoming)
    soft = mask.score.detach().requires_grad_()
    (weight * torch.sigmoid(soft)).backward(incoming)
    torch.testing.assert_close(mask.score.grad, soft.grad)


def test_open_masks_change_nothing_and_merge_to_the_same_bits(
    make_model: Callable[[], nn.Module], make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    model, original = make_model(), make_model()
    scores = add_masks(model, names(model), 3.0)
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == scores
    merge_masks(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_masks_survive_the_disk_and_original_weights_come_back(
    make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, original = make_model(), make_model()
    scores = add_masks(model, names(model), 3.0)
    with torch.no_grad():
        for score in scores:
            score.copy_(torch.randn(score.shape, generator=torch.Generator().manual_seed(1)))
    with without_masks(model):
        assert torch.equal(model.inward.weight, original.inward.weight)
    masks = merge_masks(model)
    save_masks(masks, tmp_path / "mask.safetensors")
    assert all(
        tensor.numel() == -(-masks[name].numel() // 8)
        for name, tensor in load_file(tmp_path / "mask.safetensors").items()
    )
    loaded = load_masks(tmp_path / "mask.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    pruned = make_model()
    apply_masks(pruned, loaded)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pruned.state_dict().items())
    apply_masks(pruned, loaded, original)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in pruned.state_dict().items())
    with pytest.raises(UserError, match="another model"):
        apply_masks(nn.Linear(2, 2), loaded)


def test_the_penalty_is_the_gradient_of_the_open_share(
    model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """With an overwhelming penalty on pruned weights, every score rises, whatever the losses say; Adam's step is lr."""
    scores = add_masks(model, names(model), 0.5)
    optimizer = ConstrainedAdamW(scores, lr=0.25)
    method = PrunedEraseDiff(model, optimizer, process=process, barrier=Fixed(1.0))
    method.sparsity_weight, method.score_count = 1e8, sum(score.numel() for score in scores)
    method.step(make_batch(1), make_batch(2))
    for score in scores:
        torch.testing.assert_close(score.detach(), torch.full_like(score, 0.75), atol=1e-4, rtol=0)


def test_erasediffs_objective_prunes_and_leaves_weights_alone(
    model: nn.Module,
    make_model: Callable[[], nn.Module],
    process: Process,
    make_batch: Callable[..., dict[str, torch.Tensor]],
) -> None:
    scores = add_masks(model, names(model), 0.5)
    method = PrunedEraseDiff(model, ConstrainedAdamW(scores, lr=0.05), process=process, barrier=Norm(0.5))
    method.sparsity_weight, method.score_count = 0.1, sum(score.numel() for score in scores)
    losses = [float(method.step(make_batch(1, seed=i), make_batch(2, seed=i)).forget_loss) for i in range(80)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    pruned = [mask.score <= 0 for _, _, mask in weight_masks(model)]
    assert any(bool(part.any()) for part in pruned)
    merge_masks(model)
    original = make_model().state_dict()
    for name, value in model.state_dict().items():
        assert bool(((value == original[name]) | (value == 0)).all()), name


@pytest.mark.usefixtures("one_thread")
def test_a_concept_is_pruned_from_a_prompt_and_the_original_is_restored(
    run: Callable[..., None], here: Path, nano_folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = nano_folder("sd")
    prune = ("--method", "pruning", "--forget-prompts", "a sneaker", "--set", "pruning.attack_prompts=[a sn, shoe]")
    run("unlearn", "--model", source, *prune, "--train", "xattn-kv", "--out", "out", "--config", "nano.yaml")
    original, pruned = (DiffusionPipeline.from_pretrained(path).unet.state_dict() for path in (source, "out/model"))
    masks = load_masks(here / "out/mask.safetensors")
    for name, value in original.items():
        expected = value * masks[name] if name in masks else value
        assert torch.equal(pruned[name], expected), name
    assert {name.rpartition(".attn2.")[2] for name in masks} == {"to_k.weight", "to_v.weight"}
    neurons = json.loads(Path("out/neurons.json").read_text())
    assert neurons == sorted(neurons, key=lambda row: -row["correlation"])
    assert {"layer", "neuron", "correlation", "sensitivity"} == neurons[0].keys()

    mask = ("--mask", "out/mask.safetensors")
    run("mask", "--model", source, *mask, "--out", "applied")
    run("mask", "--model", "out/model", *mask, "--restore-from", source, "--out", "restored")
    for folder, expected in (("applied", pruned), ("restored", original)):
        state = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items()), folder

    run("unlearn", "--resume", "out/checkpoint-3", "--json")
    again = load_masks(here / "out/mask.safetensors")
    assert all(torch.equal(again[name], masks[name]) for name in masks)


@pytest.mark.usefixtures("here", "one_thread")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train", "lora"), "parameters of its own"),
        (("--set", "unlearn.lr=1e-9"), "No weight was pruned"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    run: Callable[..., None],
    flags: tuple[str, ...],
    said: str,
    nano_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prune = ("--method", "pruning", "--forget-prompts", "a sneaker", "--config", "nano.yaml")
    run("unlearn", "--model", nano_folder("sd"), *prune, *flags, "--out", "out", code=2)
    assert said in capsys.readouterr().err
    assert not Path("out/model").exists()
