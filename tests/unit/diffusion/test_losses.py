"""The losses against their definitions in fp64, and the targets' promises."""

import pytest
import torch

from erasediff import GaussianNoise, Process, Relabel, UniformNoise
from erasediff.diffusion import DenoisingObjective, NoiseRole, draw_timesteps, noise_key
from erasediff_kernels import philox_noise

KEY = noise_key(11, 4, "cpu")
IDS = torch.arange(8)


def reference_loss(model, batch, process, key, role, timestep_role, target, gamma=None, antithetic=False):
    """mean over B of w_b mean |target - prediction|^2, spelled out in fp64."""
    x0 = batch["sample"].double()
    noise = philox_noise(batch["sample_ids"], key, int(role), x0.shape[1:]).double()
    t = draw_timesteps(batch["sample_ids"], key, timestep_role, process.num_train_timesteps, antithetic=antithetic)
    alpha = process.alpha.double()[t].reshape(-1, 1, 1, 1)
    sigma = process.sigma.double()[t].reshape(-1, 1, 1, 1)
    prediction = model.double()(alpha * x0 + sigma * noise, t, batch["class_labels"])[0]
    model.float()
    if target is None:
        target = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * x0,
            "sample": x0,
            "flow_prediction": noise - x0,
        }[process.prediction_type]
    per_sample = (target - prediction).square().flatten(1).mean(1)
    if gamma is not None:
        per_sample = per_sample * process.min_snr_weight(t, gamma).double()
    return per_sample.mean()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("antithetic", [False, True])
def test_retain_loss_and_gradient_equal_the_definition(model, process, make_batch, prediction_type, gamma, antithetic):
    process = Process(process.alpha, process.sigma, prediction_type, process.conditioning)
    objective = DenoisingObjective(process=process, min_snr_gamma=gamma, antithetic=antithetic)
    batch = make_batch(1)
    expected = reference_loss(
        model, batch, process, KEY, NoiseRole.RETAIN_NOISE, NoiseRole.RETAIN_TIMESTEP, None, gamma, antithetic
    )
    model.zero_grad()
    loss = objective.retain_loss(model, batch, KEY, torch.autograd.backward)
    torch.testing.assert_close(loss, expected.float())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    reference_loss(
        model, batch, process, KEY, NoiseRole.RETAIN_NOISE, NoiseRole.RETAIN_TIMESTEP, None, gamma, antithetic
    ).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("target", "distribution"), [(UniformNoise(), "uniform"), (GaussianNoise(), "normal")])
def test_noise_targets_equal_their_definition(model, process, make_batch, target, distribution):
    batch = make_batch(2)
    drawn = philox_noise(IDS, KEY, int(NoiseRole.FORGET_TARGET), (1, 2, 3), distribution=distribution).double()
    if distribution == "uniform":
        assert drawn.min() >= 0
        assert drawn.max() < 1
    expected = reference_loss(model, batch, process, KEY, NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP, drawn)
    loss = DenoisingObjective(process=process).forget_loss(model, batch, KEY, target, None)
    torch.testing.assert_close(loss, expected.float())


def test_relabel_target_is_the_detached_prediction_under_another_class(model, make_model, process, make_batch):
    batch = make_batch(2)
    teacher = make_model()
    with torch.no_grad():
        teacher.outward.weight.mul_(2)
    relabel = Relabel({"class_labels": torch.tensor([0, 3, 4])}, teacher=teacher)
    labels = relabel.relabelled({"class_labels": batch["class_labels"]}, IDS, KEY)["class_labels"]
    t = draw_timesteps(IDS, KEY, NoiseRole.FORGET_TIMESTEP, 100)
    noise = philox_noise(IDS, KEY, int(NoiseRole.FORGET_NOISE), (1, 2, 3))
    shape = (-1, 1, 1, 1)
    noisy = process.alpha[t].reshape(shape) * batch["sample"] + process.sigma[t].reshape(shape) * noise
    target = teacher(noisy, t, labels)[0].double()
    expected = reference_loss(model, batch, process, KEY, NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP, target)
    loss = DenoisingObjective(process=process).forget_loss(model, batch, KEY, relabel, torch.autograd.backward)
    torch.testing.assert_close(loss, expected.float())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_relabel_follows_the_current_model_without_a_teacher(model, process, make_batch):
    """With the label embeddings of all classes equal, the relabelled prediction is the prediction: the loss is zero."""
    with torch.no_grad():
        model.label.weight.copy_(model.label.weight[:1].expand_as(model.label.weight))
    relabel = Relabel({"class_labels": torch.tensor([0, 1, 3])})
    loss = DenoisingObjective(process=process).forget_loss(model, make_batch(2), KEY, relabel, None)
    assert loss == 0


def test_relabel_draws_every_alternative_but_never_the_samples_own():
    ids = torch.arange(30_000)
    own = ids % 5
    relabelled = Relabel({"class_labels": torch.tensor([4, 0, 3, 2])}).relabelled({"class_labels": own}, ids, KEY)
    labels = relabelled["class_labels"]
    assert (labels != own).all()
    for label in range(5):
        counts = torch.bincount(labels[own == label], minlength=5)
        allowed = [other for other in (0, 2, 3, 4) if other != label]
        expected = 6000 / len(allowed)
        assert counts.sum() == counts[allowed].sum()
        assert ((counts[allowed] - expected).square() / expected).sum() < 22


def test_relabel_replaces_embeddings_and_their_companions_together():
    ids = torch.arange(1000)
    choices = {"encoder_hidden_states": torch.randn(3, 4, 2), "text_embeds": torch.randn(3, 5)}
    condition = {"encoder_hidden_states": torch.zeros(1000, 4, 2), "text_embeds": torch.zeros(1000, 5)}
    relabelled = Relabel(choices).relabelled({**condition, "time_ids": torch.ones(1000, 6)}, ids, KEY)
    index = (relabelled["text_embeds"][:, None] == choices["text_embeds"]).all(-1).int().argmax(1)
    assert set(index.tolist()) == {0, 1, 2}
    assert torch.equal(relabelled["encoder_hidden_states"], choices["encoder_hidden_states"][index])
    assert torch.equal(relabelled["time_ids"], torch.ones(1000, 6))


def test_relabel_refuses_to_relabel_with_the_forgotten_class(model, process, make_batch):
    objective = DenoisingObjective(process=process)
    with pytest.raises(RuntimeError, match="only alternative"):
        objective.forget_loss(model, make_batch(2), KEY, Relabel({"class_labels": torch.tensor([2])}), None)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"class_labels": torch.tensor([], dtype=torch.int64)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)},
        {"class_labels": torch.tensor([1, 1])},
    ],
)
def test_relabel_refuses_choices_that_do_not_fit(choices):
    with pytest.raises(ValueError, match="Relabel"):
        Relabel(choices)


def test_relabel_names_the_entry_that_the_batch_lacks(model, process, make_batch):
    relabel = Relabel({"encoder_hidden_states": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        DenoisingObjective(process=process).forget_loss(model, make_batch(2), KEY, relabel, None)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_accumulated_micro_batches_equal_the_whole_batch(make_model, process, make_batch, steps):
    gradients = []
    for accumulation_steps in (1, steps):
        model = make_model()
        objective = DenoisingObjective(process=process, accumulation_steps=accumulation_steps, min_snr_gamma=5.0)
        retain = objective.retain_loss(model, make_batch(1), KEY, torch.autograd.backward)
        forget = objective.forget_loss(model, make_batch(2), KEY, UniformNoise(), torch.autograd.backward)
        gradients.append([retain, forget, *(parameter.grad for parameter in model.parameters())])
    for whole, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(accumulated, whole)


def test_bf16_autocast_stays_near_fp32(model, process, make_batch):
    full = DenoisingObjective(process=process).retain_loss(model, make_batch(1), KEY, None)
    half = DenoisingObjective(process=process, autocast=torch.bfloat16).retain_loss(model, make_batch(1), KEY, None)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)
    assert not torch.equal(half, full)


def test_batch_without_ids_is_numbered_from_zero(model, process, make_batch):
    objective = DenoisingObjective(process=process)
    batch = make_batch(1)
    unnumbered = {name: value for name, value in batch.items() if name != "sample_ids"}
    assert objective.retain_loss(model, unnumbered, KEY, None) == objective.retain_loss(model, batch, KEY, None)


def test_split_batch_sees_the_noise_of_the_whole(model, process, make_batch):
    """Two processes with half the batch each, or one with all of it: the same loss."""
    objective = DenoisingObjective(process=process)
    batch = make_batch(1)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 4), slice(4, 8))]
    split = sum(objective.retain_loss(model, half, KEY, None) for half in halves) / 2
    torch.testing.assert_close(split, objective.retain_loss(model, batch, KEY, None))


def test_malformed_batch_is_named(model, process, make_batch):
    objective = DenoisingObjective(process=process)
    with pytest.raises(ValueError, match='entry "sample"'):
        objective.retain_loss(model, {"class_labels": torch.zeros(3)}, KEY, None)
    with pytest.raises(ValueError, match="class_labels"):
        objective.retain_loss(model, {**make_batch(1), "class_labels": torch.zeros(3)}, KEY, None)


@pytest.mark.parametrize("setting", [{"accumulation_steps": 0}, {"min_snr_gamma": 0.0}, {"min_snr_gamma": -1.0}])
def test_settings_out_of_range_are_refused(process, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        DenoisingObjective(process=process, **setting)
