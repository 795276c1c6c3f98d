"""Options of EraseDiff's step: accumulation, precision, checkpointing, masks, frozen weights, a retain teacher."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from helpers import flat, gradients_at, weights

from erasediff import Cosine, EraseDiff, Fixed, Gap, InnerSolve, Norm, UniformNoise
from erasediff.diffusion import DenoisingObjective, micro_batches, noise_key
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, pack_mask


def test_accumulation_changes_nothing_but_rounding(make_model, process, make_batch):
    results = []
    for accumulation_steps in (1, 4):
        model = make_model()
        unlearner = EraseDiff(
            model,
            ConstrainedSGD(model.parameters(), lr=0.1),
            process=process,
            accumulation_steps=accumulation_steps,
            antithetic=True,
            min_snr_gamma=5.0,
        )
        for step in range(5):
            unlearner.step(make_batch(1, seed=step), make_batch(2, seed=50 + step))
        results.append(flat(model.parameters()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def small_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=11,
    )


def test_gradient_checkpointing_and_bf16_on_a_diffusers_unet(process):
    batch = {"sample": torch.randn(4, 1, 8, 8), "class_labels": torch.tensor([0, 1, 2, 3])}
    results = {}
    for name, autocast in (("plain", None), ("checkpointed", None), ("bf16", torch.bfloat16)):
        unet = small_unet()
        if name == "checkpointed":
            unet.enable_gradient_checkpointing()
        unlearner = EraseDiff(unet, ConstrainedAdamW(unet.parameters(), lr=1e-3), process=process, autocast=autocast)
        report = unlearner.step(batch, batch)
        results[name] = (report.grad_norm, weights(unet))
    for plain, checkpointed in zip(results["plain"][1], results["checkpointed"][1], strict=True):
        torch.testing.assert_close(checkpointed, plain)
    torch.testing.assert_close(results["bf16"][0], results["plain"][0], rtol=0.05, atol=0)


def test_frozen_parameters_stay(model, process, make_batch):
    model.label.requires_grad_(False)
    before = model.label.weight.clone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unlearner = EraseDiff(model, ConstrainedAdamW(trained, lr=1e-2), process=process)
    unlearner.step(make_batch(1), make_batch(2))
    assert torch.equal(model.label.weight, before)


def test_a_retain_teacher_keeps_the_weights_until_something_is_to_be_forgotten(model, process, make_batch):
    """r is zero while the model equals its teacher: the step is eta g under the norm barrier, and no drift."""
    retain, forget = make_batch(1), make_batch(2, seed=1)
    _, g, _ = gradients_at(model, process, retain, forget, UniformNoise())
    before = flat(model.parameters())
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    unlearner = EraseDiff(
        model,
        ConstrainedSGD(model.parameters(), lr=1.0),
        process=process,
        barrier=Norm(0.3),
        retain_teacher=teacher,
        max_grad_norm=None,
    )
    report = unlearner.step(retain, forget)
    assert float(report.retain_loss) == 0.0
    torch.testing.assert_close(before - flat(model.parameters()), 0.3 * g, rtol=1e-4, atol=1e-7)
    assert torch.equal(flat(teacher.parameters()), before)


def test_preservation_loss_is_the_distance_of_two_predictions_at_the_same_states(make_model, process, make_batch):
    model, teacher = make_model(), make_model()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05)
    batch, key, seen = make_batch(1), noise_key(0, 3, "cpu"), []

    def denoiser(module, noisy_sample, timesteps, condition):
        prediction = module(noisy_sample, timesteps, **condition, return_dict=False)[0]
        seen.append((noisy_sample.detach().clone(), timesteps.clone(), prediction.detach().double()))
        return prediction

    objective = DenoisingObjective(process=process, denoiser=denoiser)
    loss = sum(
        objective.preservation_loss(model, teacher, part, weight, key=key) for part, weight in micro_batches(batch, 2)
    )
    loss.backward()
    loss = loss.detach()
    theirs, ours = seen[::2], seen[1::2]
    for (x, t, _), (y, u, _) in zip(theirs, ours, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(t, u)
    distance = torch.cat([p - q for (_, _, p), (_, _, q) in zip(theirs, ours, strict=True)]).square().mean()
    assert float(loss) == pytest.approx(float(distance), rel=1e-5)
    seen.clear()
    objective.retain_loss(model, *micro_batches(batch)[0], key=key)
    assert torch.equal(torch.cat([x for x, _, _ in seen]), torch.cat([x for x, _, _ in ours]))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_unknown_option_and_bad_settings_are_refused(model, process):
    optimizer = ConstrainedAdamW(model.parameters(), lr=1e-2)
    with pytest.raises(TypeError, match="gradient_clip"):
        EraseDiff(model, optimizer, process=process, gradient_clip=1.0)
    for name in ("max_grad_norm", "accumulation_steps"):
        with pytest.raises(ValueError, match=name):
            EraseDiff(model, optimizer, process=process, **{name: 0})
    for barrier, value in ((Norm, 0.0), (Gap, -1.0), (Cosine, 0.0), (Fixed, -0.1)):
        with pytest.raises(ValueError, match=r"must"):
            barrier(value)
    with pytest.raises(ValueError, match="InnerSolve"):
        InnerSolve(steps=-1)
    with pytest.raises(ValueError, match="requires a gradient"):
        EraseDiff(model, ConstrainedAdamW([torch.zeros(2)], lr=1.0), process=process)


def test_masked_elements_have_no_part_in_the_step(model, process, make_batch):
    """With a bit mask on one tensor the step is the closed form over the unmasked elements, and the rest stays."""
    retain, forget = make_batch(1), make_batch(2)
    r, g, _ = gradients_at(model, process, retain, forget, UniformNoise())
    keep = {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()}
    keep["inward.weight"] = torch.rand(model.inward.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = flat(keep.values())
    before = flat(model.parameters())
    optimizer = ConstrainedSGD(model.parameters(), lr=1.0)
    optimizer.set_mask(model.inward.weight, pack_mask(keep["inward.weight"]))
    report = EraseDiff(model, optimizer, process=process, max_grad_norm=0.05).step(retain, forget)
    r, g = r * kept, g * kept
    delta = r + max(0.0, 0.1 - float(r @ g / (g @ g))) * g
    assert float(report.grad_norm) == pytest.approx(float(delta.norm()), rel=1e-5)
    delta *= min(1.0, 0.05 / (float(delta.norm()) + 1e-6))
    moved = before - flat(model.parameters())
    assert (moved[kept == 0] == 0).all()
    torch.testing.assert_close(moved, delta, rtol=1e-4, atol=1e-6)
