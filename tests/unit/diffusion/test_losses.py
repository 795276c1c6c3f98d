"""The losses against their definitions in fp64, and the targets' promises."""

import copy
from functools import partial

import pytest
import torch

from erasediff import EraseDiff, GaussianNoise, Process, Relabel, UniformNoise
from erasediff.diffusion import DenoisingObjective, NoiseRole, draw_timesteps, micro_batches, noise_key
from erasediff_kernels import ConstrainedSGD, philox_noise

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
    loss = objective.retain_loss(model, *micro_batches(batch)[0], key=KEY)
    loss.backward()
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
    loss = DenoisingObjective(process=process).forget_loss(model, target, *micro_batches(batch)[0], key=KEY)
    torch.testing.assert_close(loss, expected.float())


def test_relabel_target_is_the_detached_prediction_under_another_class(model, make_model, process, make_batch):
    batch = make_batch(2)
    teacher = make_model().requires_grad_(False).eval()
    teacher.outward.weight.mul_(2)
    relabel = Relabel({"class_labels": torch.tensor([0, 3, 4])}, teacher=teacher)
    labels = relabel.relabelled({"class_labels": batch["class_labels"]}, IDS, KEY)["class_labels"]
    t = draw_timesteps(IDS, KEY, NoiseRole.FORGET_TIMESTEP, 100)
    noise = philox_noise(IDS, KEY, int(NoiseRole.FORGET_NOISE), (1, 2, 3))
    shape = (-1, 1, 1, 1)
    noisy = process.alpha[t].reshape(shape) * batch["sample"] + process.sigma[t].reshape(shape) * noise
    target = teacher(noisy, t, labels)[0].double()
    expected = reference_loss(model, batch, process, KEY, NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP, target)
    loss = DenoisingObjective(process=process).forget_loss(model, relabel, *micro_batches(batch)[0], key=KEY)
    loss.backward()
    torch.testing.assert_close(loss, expected.float())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_relabel_follows_the_current_model_without_a_teacher(model, process, make_batch):
    """With the label embeddings of all classes equal, the relabelled prediction is the prediction: the loss is zero."""
    with torch.no_grad():
        model.label.weight.copy_(model.label.weight[:1].expand_as(model.label.weight))
    relabel = Relabel({"class_labels": torch.tensor([0, 1, 3])})
    loss = DenoisingObjective(process=process).forget_loss(model, relabel, *micro_batches(make_batch(2))[0], key=KEY)
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
    relabel = Relabel({"class_labels": torch.tensor([2])})
    with pytest.raises(RuntimeError, match="only alternative"):
        objective.forget_loss(model, relabel, *micro_batches(make_batch(2))[0], key=KEY)


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
        DenoisingObjective(process=process).forget_loss(model, relabel, *micro_batches(make_batch(2))[0], key=KEY)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
def test_accumulated_micro_batches_equal_the_whole_batch(make_model, process, make_batch, steps):
    gradients = []
    objective = DenoisingObjective(process=process, min_snr_gamma=5.0)
    for count in (1, steps):
        model = make_model()
        losses = [
            objective.retain_loss(model, part, weight, key=KEY) for part, weight in micro_batches(make_batch(1), count)
        ] + [
            objective.forget_loss(model, UniformNoise(), part, weight, key=KEY)
            for part, weight in micro_batches(make_batch(2), count)
        ]
        sum(losses).backward()
        gradients.append([sum(losses).detach(), *(parameter.grad for parameter in model.parameters())])
    for whole, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(accumulated, whole)


def retain_loss(objective, model, batch):
    return objective.retain_loss(model, *micro_batches(batch)[0], key=KEY).detach()


def test_bf16_autocast_stays_near_fp32(model, process, make_batch):
    full = retain_loss(DenoisingObjective(process=process), model, make_batch(1))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    half = retain_loss(DenoisingObjective(process=process, autocast=autocast), model, make_batch(1))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)
    assert not torch.equal(half, full)


def test_batch_without_ids_is_numbered_from_zero(model, process, make_batch):
    objective = DenoisingObjective(process=process)
    batch = make_batch(1)
    unnumbered = {name: value for name, value in batch.items() if name != "sample_ids"}
    assert retain_loss(objective, model, unnumbered) == retain_loss(objective, model, batch)


def test_split_batch_sees_the_noise_of_the_whole(model, process, make_batch):
    """Two processes with half the batch each, or one with all of it: the same loss."""
    objective = DenoisingObjective(process=process)
    batch = make_batch(1)
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 4), slice(4, 8))]
    split = sum(retain_loss(objective, model, half) for half in halves) / 2
    torch.testing.assert_close(split, retain_loss(objective, model, batch))


def test_malformed_batch_is_named(make_batch):
    with pytest.raises(ValueError, match='entry "sample"'):
        micro_batches({"class_labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="class_labels"):
        micro_batches({**make_batch(1), "class_labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="at least one sample"):
        micro_batches({"sample": torch.zeros(0, 1, 2, 3)})


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_settings_out_of_range_are_refused(process, gamma):
    with pytest.raises(ValueError, match="min_snr_gamma"):
        DenoisingObjective(process=process, min_snr_gamma=gamma)


def test_teachers_must_be_frozen_and_are_left_as_they_are(model, process):
    """To freeze them would freeze the user's own module, be it the one that is trained."""
    trains, evaluates = (copy.deepcopy(model) for _ in range(2))
    trains.requires_grad_(False)
    evaluates.eval()
    choices = {"class_labels": torch.tensor([0])}
    for teacher in (model, trains, evaluates):
        with pytest.raises(ValueError, match="frozen"):
            Relabel(choices, teacher)
        with pytest.raises(ValueError, match="frozen"):
            EraseDiff(model, ConstrainedSGD(model.parameters(), lr=0.1), process=process, retain_teacher=teacher)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


PREDICTION_OF_NOISE = {
    "epsilon": lambda eps, x, alpha, sigma: eps,
    "v_prediction": lambda eps, x, alpha, sigma: (eps - sigma * x) / alpha,
    "sample": lambda eps, x, alpha, sigma: (x - sigma * eps) / alpha,
    "flow_prediction": lambda eps, x, alpha, sigma: (eps - x) / alpha,
}


@pytest.mark.parametrize("prediction_type", PREDICTION_OF_NOISE)
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize(("kind", "distribution"), [(UniformNoise, "uniform"), (GaussianNoise, "normal")])
def test_the_published_target_holds_for_every_parametrisation(
    make_batch, process, prediction_type, gamma, kind, distribution
):
    """A model that says the same of the noise has the published L_f, E |eps_f - eps_theta|^2, whatever it predicts."""
    sigma = process.sigma.double()
    alpha = 1 - sigma if prediction_type == "flow_prediction" else process.alpha.double()
    process = Process(alpha.float(), sigma.float(), prediction_type, process.conditioning)
    batch = make_batch(2)
    t = draw_timesteps(IDS, KEY, NoiseRole.FORGET_TIMESTEP, 100)
    column = (-1, 1, 1, 1)
    alpha, sigma = alpha[t].reshape(column), sigma[t].reshape(column)
    eps_theta = torch.randn(8, 1, 2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def denoiser(model, noisy_sample, timesteps, condition):
        return PREDICTION_OF_NOISE[prediction_type](eps_theta, noisy_sample.double(), alpha, sigma).float()

    objective = DenoisingObjective(process=process, denoiser=denoiser, min_snr_gamma=gamma)
    eps_f = philox_noise(IDS, KEY, int(NoiseRole.FORGET_TARGET), (1, 2, 3), distribution=distribution).double()
    expected = (eps_f - eps_theta).square().flatten(1).mean(1)
    if gamma is not None:
        snr = (alpha / sigma).square().flatten()
        expected = expected * snr.clamp(max=gamma) / snr
    loss = objective.forget_loss(torch.nn.Identity(), kind(), *micro_batches(batch)[0], key=KEY)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=2e-5, atol=0)


def test_raw_predictions_are_compared_only_where_a_setting_says_so(model, process, make_batch):
    batch = make_batch(2)
    process = Process(process.alpha, process.sigma, "v_prediction", process.conditioning)
    drawn = philox_noise(IDS, KEY, int(NoiseRole.FORGET_TARGET), (1, 2, 3), distribution="uniform").double()
    expected = reference_loss(model, batch, process, KEY, NoiseRole.FORGET_NOISE, NoiseRole.FORGET_TIMESTEP, drawn)
    objective, part = DenoisingObjective(process=process), micro_batches(batch)[0]
    raw = objective.forget_loss(model, UniformNoise(space="prediction"), *part, key=KEY)
    torch.testing.assert_close(raw, expected.float())
    assert not torch.isclose(objective.forget_loss(model, UniformNoise(), *part, key=KEY), raw, rtol=0.01)
    with pytest.raises(ValueError, match="space"):
        UniformNoise(space="velocity")
