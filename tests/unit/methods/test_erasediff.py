"""One step of the solver against its formula, and the promises that an embedding training stack relies on."""

import copy
import math

import pytest
import torch
from helpers import flat, gradients_at, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from erasediff import Cosine, EraseDiff, Fixed, Gap, GaussianNoise, InnerSolve, Norm, Relabel, UniformNoise
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, constraint_multiplier, gradient_gram

BARRIERS = [Norm(0.3), Gap(0.5), Fixed(0.7), Cosine(0.4)]
TARGETS = [UniformNoise(), GaussianNoise(), Relabel({"class_labels": torch.tensor([0, 1, 3])})]


def name_of(value):
    return type(value).__name__


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
@pytest.mark.parametrize("barrier", BARRIERS, ids=name_of)
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_step_moves_along_the_closed_form(model, process, make_batch, barrier, target, max_grad_norm):
    """theta - theta' = lr clip (r + lambda g) with lambda = max(0, (a - <r,g>) / |g|^2), in fp64."""
    retain, forget = make_batch(1), make_batch(2, seed=1)
    r, g, forget_loss = gradients_at(model, process, retain, forget, target)
    before = flat(model.parameters())
    unlearner = EraseDiff(
        model,
        ConstrainedSGD(model.parameters(), lr=1.0),
        process=process,
        barrier=barrier,
        target=target,
        inner=InnerSolve(steps=2, lr=0.05),
        max_grad_norm=max_grad_norm,
    )
    report = unlearner.step(retain, forget)
    match barrier:
        case Norm(eta):
            multiplier = max(0.0, eta - float(r @ g / (g @ g)))
        case Gap(eta):
            multiplier = max(0.0, float((eta * max(float(report.gap), 0.0) - r @ g) / (g @ g)))
        case Cosine(eta):
            multiplier = max(0.0, eta - float(r @ g / (r.norm() * g.norm())))
        case Fixed(value):
            multiplier = value
    delta = r + multiplier * g
    assert float(report.multiplier) == pytest.approx(multiplier, rel=1e-5, abs=1e-7)
    assert float(report.grad_norm) == pytest.approx(float(delta.norm()), rel=1e-5)
    assert float(report.forget_loss) == pytest.approx(float(forget_loss), rel=1e-6)
    if max_grad_norm is not None:
        delta *= min(1.0, max_grad_norm / (float(delta.norm()) + 1e-6))
    torch.testing.assert_close(before - flat(model.parameters()), delta, rtol=1e-4, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 40),
    scale=st.floats(-3, 3),
    alignment=st.floats(-1, 1),
    eta=st.floats(1e-3, 10),
)
def test_norm_barrier_guarantees_descent_on_the_forget_loss(seed, size, scale, alignment, eta):
    """<delta, g> >= eta |g|^2 for any r and g."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(size, generator=generator, dtype=torch.float64)
    r = 10**scale * (torch.randn(size, generator=generator, dtype=torch.float64) + 10 * alignment * g)
    multiplier = constraint_multiplier(gradient_gram([r], [g]), "norm", eta).multiplier.double()
    delta = r + multiplier * g
    slack = 1e-6 * float(r.norm() * g.norm() + (multiplier + eta) * (g @ g))
    assert float(delta @ g) >= eta * float(g @ g) - slack


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), max_norm=st.floats(1e-3, 1e3), multiplier=st.floats(0, 100))
def test_clip_from_the_gram_equals_clip_grad_norm(seed, max_norm, multiplier):
    generator = torch.Generator().manual_seed(seed)
    r = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (7,), (2, 2, 2))]
    g = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in r]
    constraint = constraint_multiplier(gradient_gram(r, g), "fixed", multiplier, max_norm=max_norm)
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in r]
    for parameter, a, b in zip(parameters, r, g, strict=True):
        parameter.grad = a + multiplier * b
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    assert float(constraint.norm) == pytest.approx(float(norm), rel=1e-6)
    clipped = flat(parameter.grad for parameter in parameters)
    torch.testing.assert_close(
        clipped, float(constraint.clip_scale) * (flat(r) + multiplier * flat(g)), rtol=1e-6, atol=1e-9
    )


class EagerNorm(Norm):
    """The norm barrier, made to run the inner solve that it does not need."""

    needs_inner_solve = True


@pytest.mark.parametrize("barrier_class", [Norm, EagerNorm])
def test_norm_barrier_does_not_depend_on_the_inner_solve(make_model, process, make_batch, barrier_class):
    """K = 0 and K = 3 give the same weights bit for bit, whether the inner solve is skipped or run."""
    results = []
    for barrier, steps in ((Norm(0.5), 0), (barrier_class(0.5), 3)):
        model = make_model()
        unlearner = EraseDiff(
            model,
            ConstrainedAdamW(model.parameters(), lr=1e-2),
            process=process,
            barrier=barrier,
            inner=InnerSolve(steps=steps, lr=0.1),
        )
        for step in range(5):
            unlearner.step(make_batch(1, seed=step), make_batch(2, seed=50 + step))
        results.append(weights(model))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_gap_compares_both_weights_on_the_same_batch_and_noise(model, process, make_batch):
    retain, forget = make_batch(1), make_batch(2)

    def gap(steps, lr):
        twin = copy.deepcopy(model)
        unlearner = EraseDiff(
            twin,
            ConstrainedSGD(twin.parameters(), lr=0.1),
            process=process,
            barrier=Gap(),
            inner=InnerSolve(steps=steps, lr=lr),
        )
        return float(unlearner.step(retain, forget).gap)

    assert gap(0, 0.1) == 0.0
    # SGD on this very batch, timesteps and noise: the first-order prediction of the descent holds.
    _, g, _ = gradients_at(model, process, retain, forget, UniformNoise())
    assert gap(1, 1e-3) == pytest.approx(1e-3 * float(g @ g), rel=0.02)
    assert gap(20, 0.05) > gap(5, 0.05) > 0


def test_inner_solve_is_refreshed_every_n_steps(model, process, make_batch):
    unlearner = EraseDiff(
        model,
        ConstrainedSGD(model.parameters(), lr=0.1),
        process=process,
        barrier=Gap(),
        inner=InnerSolve(steps=1, lr=0.1, refresh_every=3),
    )
    copies = []
    for step in range(5):
        unlearner.step(make_batch(1, seed=step), make_batch(2, seed=step))
        copies.append(flat(unlearner.inner.weights))
    assert torch.equal(copies[0], copies[1])
    assert torch.equal(copies[1], copies[2])
    assert not torch.equal(copies[2], copies[3])
    assert torch.equal(copies[3], copies[4])


OPTIMIZERS = {
    "ConstrainedAdamW": lambda p: ConstrainedAdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
}


def test_any_optimizer_takes_the_same_steps(make_model, process, make_batch):
    results = []
    for make_optimizer in OPTIMIZERS.values():
        model = make_model()
        unlearner = EraseDiff(model, make_optimizer(model.parameters()), process=process, max_grad_norm=0.5)
        for step in range(10):
            unlearner.step(make_batch(1, seed=step), make_batch(2, seed=50 + step))
        results.append(flat(model.parameters()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["retain", "forget"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_non_finite_step_is_skipped_and_counted(model, process, make_batch, make_optimizer, which, bad):
    optimizer = make_optimizer(model.parameters())
    unlearner = EraseDiff(model, optimizer, process=process)
    unlearner.step(make_batch(1), make_batch(2))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
    batches = {"retain": make_batch(1), "forget": make_batch(2)}
    batches[which]["sample"][3, 0, 1, 1] = bad
    report = unlearner.step(batches["retain"], batches["forget"])
    assert not report.finite
    assert report.skipped == 1
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][index][name])), name
    report = unlearner.step(make_batch(1), make_batch(2))
    assert report.finite
    assert report.skipped == 1
    assert not torch.equal(before[0], next(model.parameters()))


class HostReads(TorchDispatchMode):
    """Collects the operators that make the host wait for a tensor's value."""

    SYNCHRONISING = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.is_nonzero", "aten.unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.SYNCHRONISING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["ConstrainedAdamW", "AdamW fused"])
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
@pytest.mark.parametrize("barrier", BARRIERS, ids=name_of)
def test_step_reads_nothing_on_the_host(model, process, make_batch, barrier, target, optimizer):
    unlearner = EraseDiff(
        model, OPTIMIZERS[optimizer](model.parameters()), process=process, barrier=barrier, target=target
    )
    retain, forget = make_batch(1), make_batch(2)
    unlearner.step(retain, forget)
    with HostReads() as reads:
        report = unlearner.step(retain, forget)
    assert reads.seen == []
    with reads:
        float(report.retain_loss)
    assert reads.seen, "the detector itself must see a read"


@pytest.mark.parametrize("barrier", BARRIERS, ids=name_of)
@pytest.mark.parametrize("interrupted_after", [1, 4])
def test_resumed_run_equals_the_uninterrupted_one(make_model, process, make_batch, barrier, interrupted_after):
    def start():
        model = make_model()
        optimizer = ConstrainedAdamW(model.parameters(), lr=1e-2, weight_decay=0.01, ema_decay=0.9)
        return EraseDiff(
            model,
            optimizer,
            process=process,
            barrier=barrier,
            inner=InnerSolve(steps=1, lr=0.1, refresh_every=3),
            seed=9,
        )

    def steps(unlearner, start, stop):
        return [unlearner.step(make_batch(1, seed=s), make_batch(2, seed=50 + s)) for s in range(start, stop)]

    whole = start()
    reports = steps(whole, 0, 7)
    first = start()
    steps(first, 0, interrupted_after)
    saved = copy.deepcopy((first.state_dict(), first.model.state_dict()))
    second = start()
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.normal_()
    second.model.load_state_dict(saved[1])
    second.load_state_dict(saved[0])
    resumed = steps(second, interrupted_after, 7)
    for expected, actual in zip(reports[interrupted_after:], resumed, strict=True):
        for name, value in expected.scalars().items():
            assert torch.equal(value, actual.scalars()[name]), name
    for expected, actual in zip(weights(whole.model), weights(second.model), strict=True):
        assert torch.equal(expected, actual)
    for (_, expected), (_, actual) in zip(
        whole.optimizer.ema_parameters(), second.optimizer.ema_parameters(), strict=True
    ):
        assert torch.equal(expected, actual)
