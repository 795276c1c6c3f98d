"""The baselines do what their names say, through the same protocol."""

import pytest
import torch

from erasediff.diffusion import DenoisingObjective, NoiseRole, micro_batches, noise_key
from erasediff.methods import METHOD_SPECS, EraseDiff, FineTune, NegativeGradient
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD


@pytest.mark.parametrize("kind", [EraseDiff, FineTune, NegativeGradient])
def test_every_method_steps_reports_and_resumes(make_model, process, make_batch, kind):
    model, twin = make_model(), make_model()
    method = kind(model, ConstrainedAdamW(model.parameters(), lr=1e-2), process=process, seed=4)
    assert METHOD_SPECS[method.name].name == method.name
    for step in range(3):
        report = method.step(make_batch(1, seed=step), make_batch(2, seed=step))
    assert method.iteration == 3
    assert {"grad_norm", "finite", "skipped"} <= report.scalars().keys()
    resumed = kind(twin, ConstrainedAdamW(twin.parameters(), lr=1e-2), process=process, seed=4)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(method.state_dict())
    batches = make_batch(1, seed=9), make_batch(2, seed=9)
    method.step(*batches)
    resumed.step(*batches)
    for first, second in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(first, second)


def test_finetune_descends_on_the_retained_loss_and_ignores_the_forgotten_batch(make_model, process, make_batch):
    first, second = make_model(), make_model()
    for model, forget in ((first, None), (second, make_batch(2))):
        method = FineTune(model, ConstrainedSGD(model.parameters(), lr=0.1), process=process)
        losses = [float(method.step(make_batch(1), forget).retain_loss) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_negative_gradient_is_the_ascent_direction(model, make_model, process, make_batch):
    batch = make_batch(2)
    twin = make_model()
    loss = DenoisingObjective(process=process).denoising_loss(
        twin,
        *micro_batches(batch)[0],
        key=noise_key(0, 0, "cpu"),
        noise=NoiseRole.FORGET_NOISE,
        timestep=NoiseRole.FORGET_TIMESTEP,
    )
    loss.backward()
    optimizer = ConstrainedSGD(model.parameters(), lr=0.5)
    method = NegativeGradient(model, optimizer, process=process, max_grad_norm=None)
    report = method.step(make_batch(1), batch)
    assert torch.equal(report.forget_loss, loss)
    for moved, original in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved, original + 0.5 * original.grad)
