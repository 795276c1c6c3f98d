"""Pruning: the mask's gradient, what is stored, what it brings back, and the command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from erasediff import Norm, Process
from erasediff.errors import UserError
from erasediff.methods import ESD, EraseDiff, Fixed, Solver
from erasediff.methods.activation_stats import Observation, concept_neurons, of_batches
from erasediff.methods.concept_prune import HeldMask
from erasediff.methods.pruning import PrunedEraseDiff, correlated
from erasediff.models.weight_masks import (
    WeightMask,
    add_masks,
    apply_masks,
    limit_masks,
    load_masks,
    masked_weights,
    merge_masks,
    save_masks,
    weight_masks,
    without_masks,
)
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
    method = PrunedEraseDiff(model, optimizer, process=process, barrier=Fixed(1.0), sparsity_weight=1e8)
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
    optimizer = ConstrainedAdamW(scores, lr=0.05)
    method = PrunedEraseDiff(model, optimizer, process=process, barrier=Norm(0.5), sparsity_weight=0.1)
    losses = [float(method.step(make_batch(1, seed=i), make_batch(2, seed=i)).forget_loss) for i in range(80)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    pruned = [mask.score <= 0 for _, _, mask in weight_masks(model)]
    assert any(bool(part.any()) for part in pruned)
    merge_masks(model)
    original = make_model().state_dict()
    for name, value in model.state_dict().items():
        assert bool(((value == original[name]) | (value == 0)).all()), name


def batches_of(make_batch: Callable[..., dict[str, torch.Tensor]], label: int) -> Callable[[int], list[dict[str, Any]]]:
    return lambda count: [make_batch(label, seed=index) for index in range(count)]


def looks(
    method: Solver, make_batch: Callable[..., dict[str, torch.Tensor]], concept: int = 2
) -> Callable[[int], Iterator[Observation]]:
    return partial(of_batches, method, batches_of(make_batch, 1), batches_of(make_batch, concept))


def test_only_what_the_concept_drives_most_can_be_pruned(
    model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Scores fall as fast as they can, yet of each layer no more goes than the share that is most correlated."""
    scores = add_masks(model, names(model), 0.5)
    method = PrunedEraseDiff(model, ConstrainedAdamW(scores, lr=0.5), process=process, barrier=Fixed(1.0))
    method.sparsity_weight = -1e8
    importance = correlated(method, looks(method, make_batch), 4)
    limit_masks(model, importance, 0.1)
    for index in range(5):
        method.step(make_batch(1, seed=index), make_batch(2, seed=index))
    for name, _, mask in weight_masks(model):
        pruned = mask.score <= 0
        assert 0 < int(pruned.sum()) <= round(0.1 * pruned.numel())
        assert bool((importance[name][pruned] > 0).all())
        assert importance[name][pruned].min() >= importance[name][~pruned].max()


def test_correlation_is_the_weight_times_the_difference_of_its_inputs(
    model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    scores = add_masks(model, names(model), 0.5)
    method = PrunedEraseDiff(model, ConstrainedAdamW(scores, lr=0.5), process=process)
    found = correlated(method, looks(method, make_batch), 2)["inward"]
    # Of the inputs, the last eight are the label's embedding, alike in every sample.
    rows = model.label.weight.detach()
    expected = model.inward.weight.detach().abs()[:, -8:] * (rows[2].abs() - rows[1].abs())
    torch.testing.assert_close(found[:, -8:], expected)


def test_batches_of_two_sizes_are_observed_apart(
    model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Images come in buckets: a batch to retain and one to forget need not be of one size."""
    method = PrunedEraseDiff(model, ConstrainedAdamW(add_masks(model, names(model), 0.5), lr=0.5), process=process)
    retain, forget = make_batch(1), make_batch(2)
    wide = forget | {"sample": torch.cat([forget["sample"]] * 2, dim=-1)}
    seen = list(of_batches(method, lambda count: [retain] * count, lambda count: [wide] * count, 2))
    assert [tuple(o.sample.shape) for o in seen] == [tuple(retain["sample"].shape), tuple(wide["sample"].shape)] * 2
    assert [o.of_concept.unique().tolist() for o in seen] == [[False], [True]] * 2
    together = next(of_batches(method, lambda count: [retain] * count, lambda count: [forget] * count, 1))
    assert torch.equal(seen[0].sample, together.sample[~together.of_concept])


def test_training_free_prunes_the_largest_scores_that_are_the_concepts_own(
    model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """Wanda's formula, neuron by neuron, in fp64; then steps train what survives and nothing else."""
    held = make_held(model, process, make_batch)
    original = {
        name: weight.detach().clone() for name, weight in zip(("inward", "outward"), masked_weights(model), strict=True)
    }
    for index in range(3):
        held.step(make_batch(1, seed=index), make_batch(2, seed=index))
    seen = list(looks(held.tuned, make_batch)(3))
    pruned = {name: mask.score < 0 for name, _, mask in weight_masks(model)}
    expected = torch.zeros_like(pruned["inward"])
    for early in (False, True):
        norms = []
        for of_concept in (False, True):
            rows = [
                torch.cat(
                    [o.sample.flatten(1), o.timesteps[:, None] / 100, model.label(o.condition["class_labels"])], 1
                )[(o.of_concept == of_concept) & ((o.timesteps < 50) == early)]
                for o in seen
            ]
            norms.append(torch.cat(rows).detach().double().square().mean(0).sqrt())
        elsewhere, concept = norms
        scores = original["inward"].double().abs() * concept
        for neuron, row in enumerate(scores):
            largest = row.argsort(descending=True)[: round(0.2 * len(row))]
            expected[neuron, largest] |= (concept > elsewhere)[largest]
    assert torch.equal(pruned["inward"], expected)
    assert 0 < int(expected.sum()) < expected.numel()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    for index in range(3, 6):
        held.step(make_batch(1, seed=index), make_batch(2, seed=index))
    masks = merge_masks(model)
    for name in ("inward", "outward"):
        weight, kept = model.state_dict()[f"{name}.weight"], masks[f"{name}.weight"]
        assert bool((weight[~kept] == 0).all())
        assert bool((weight[kept] != original[name][kept]).all())
    assert torch.equal(model.state_dict()["inward.bias"], before["inward.bias"])


@pytest.mark.parametrize("killed_after", [2, 4])
def test_a_held_mask_resumes_bit_for_bit(
    make_model: Callable[[], nn.Module],
    process: Process,
    make_batch: Callable[..., dict[str, torch.Tensor]],
    killed_after: int,
) -> None:
    whole, killed, resumed = (make_held(make_model(), process, make_batch) for _ in range(3))
    for held, first, last in ((whole, 0, 6), (killed, 0, killed_after), (resumed, killed_after, 6)):
        if held is resumed:
            held.tuned.model.load_state_dict(killed.tuned.model.state_dict())
            held.load_state_dict(copy.deepcopy(killed.state_dict()))
            assert held.iteration == killed_after
        for index in range(first, last):
            held.step(make_batch(1, seed=index), make_batch(2, seed=index))
    ended = (merge_masks(held.tuned.model) or held.tuned.model.state_dict() for held in (whole, resumed))
    first, second = ended
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(
        torch.equal(value, resumed.tuned.model.state_dict()[name])
        for name, value in whole.tuned.model.state_dict().items()
    )


def test_the_neurons_of_erasediffs_objective_are_those_that_were_switched_off(
    model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    scores = add_masks(model, names(model), 0.5)
    method = PrunedEraseDiff(model, ConstrainedAdamW(scores, lr=0.5), process=process)
    with torch.no_grad():
        masks = {name: mask for name, _, mask in weight_masks(model)}
        masks["outward"].score[3] = -1.0
        model.outward.bias[3] = 0
    rows = concept_neurons(method, looks(method, make_batch)(2))
    assert (rows[0]["layer"], rows[0]["neuron"]) == ("outward", 3)
    assert rows[0]["correlation"] > 0
    assert all(row["correlation"] == 0 for row in rows[1:])


def test_references_are_preserved_while_the_concept_goes(make_model: Callable[[], nn.Module], process: Process) -> None:
    """Half of the trajectories are theirs; what the model says of them moves less than where they are not looked at."""
    labels = {
        name: {"class_labels": torch.tensor([label])} for name, label in (("concept", 1), ("kept", 2), ("null", 5))
    }
    moved = {}
    for name, references in (("with", labels["kept"]), ("without", None)):
        model, original = make_model(), make_model()
        method = ESD(
            model,
            ConstrainedAdamW(model.parameters(), lr=1e-2),
            process=process,
            teacher=make_model().requires_grad_(False).eval(),
            concepts=labels["concept"],
            null=labels["null"],
            references=references,
            shape=(1, 2, 3),
            batch_size=8,
            num_inference_steps=10,
        )
        if references is not None:
            assert method.condition(7)["class_labels"].tolist() == [1, 2] * 4
        reports = [method.step() for _ in range(60)]
        assert float(reports[-1].forget_loss) < 0.5 * float(reports[0].forget_loss)
        if references is not None:
            torch.testing.assert_close(reports[0].retain_loss, torch.tensor(0.0), atol=1e-9, rtol=0)
        sample, times = torch.randn(64, 1, 2, 3), torch.arange(64)
        condition = {"class_labels": torch.full((64,), 2)}
        moved[name] = (model(sample, times, **condition)[0] - original(sample, times, **condition)[0]).square().mean()
    assert moved["with"] < 0.3 * moved["without"]


def make_held(model: nn.Module, process: Process, make_batch: Callable[..., dict[str, torch.Tensor]]) -> HeldMask:
    """Three looks in two bins, at most a fifth of each neuron's weights; then EraseDiff on what survives."""
    for score in add_masks(model, names(model), 0.5):
        score.requires_grad_(False)
    weights = [weight.requires_grad_(True) for weight in masked_weights(model)]
    tuned = EraseDiff(model, ConstrainedAdamW(weights, lr=0.01), process=process, barrier=Norm(0.5))
    return HeldMask(tuned, looks(tuned, make_batch), masks=None, count=3, share=0.2, bins=2)


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


@pytest.mark.usefixtures("one_thread")
def test_a_mask_without_learning_is_held_by_a_run_that_tunes_the_rest(
    run: Callable[..., None], here: Path, nano_folder: Callable[[str], Path]
) -> None:
    source = nano_folder("sd")
    prune = (
        "--method",
        "pruning",
        "--forget-prompts",
        "a sneaker",
        "--train",
        "re:ff\\.net\\.2",
        "--config",
        "free.yaml",
    )
    Path("free.yaml").write_text(
        "threads: 1\nimages: {height: 32, width: 32}\nunlearn: {batch_size: 2}\nesd: {num_inference_steps: 4}\n"
        "pruning: {variant: training-free, share: 0.2, observations: 3}\n"
    )
    run("unlearn", "--model", source, *prune, "--out", "out")
    held = ("--set", "pruning.mask=out/mask.safetensors", "--steps", "2", "--lr", "0.01")
    run("unlearn", "--model", source, *prune, *held, "--out", "tuned")
    original, pruned, tuned = (
        DiffusionPipeline.from_pretrained(path).unet.state_dict() for path in (source, "out/model", "tuned/model")
    )
    masks = load_masks(here / "out/mask.safetensors")
    assert {name.rpartition(".ff.")[2] for name in masks} == {"net.2.weight"}
    for name, value in original.items():
        if name in masks:
            assert not bool(masks[name].all())
            assert torch.equal(pruned[name], value * masks[name])
            assert torch.equal(tuned[name] == 0, ~masks[name])
            assert not torch.equal(tuned[name], pruned[name])
        else:
            assert torch.equal(pruned[name], value)
            assert torch.equal(tuned[name], value)


@pytest.mark.usefixtures("here", "one_thread")
@pytest.mark.parametrize(
    ("flags", "said", "code"),
    [
        (("--train", "lora"), "parameters of its own", 2),
        (("--set", "unlearn.lr=1e-9"), "No weight was pruned", 3),
    ],
)
def test_what_cannot_succeed_is_told_in_a_sentence(
    run: Callable[..., None],
    flags: tuple[str, ...],
    said: str,
    code: int,
    nano_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prune = ("--method", "pruning", "--forget-prompts", "a sneaker", "--config", "nano.yaml")
    run("unlearn", "--model", nano_folder("sd"), *prune, *flags, "--out", "out", code=code)
    assert said in capsys.readouterr().err
    assert not Path("out/model").exists()
