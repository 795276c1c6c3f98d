"""Barriers against their papers: closed forms and numerical optima in fp64, properties, state, and the registry."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from erasediff import Conflict, Cosine, EraseDiff, Fixed, Gap, Nash, Norm, Process, Threshold
from erasediff.config import UnlearnConfig, load_config
from erasediff.config.method_index import barrier_names
from erasediff.errors import UserError
from erasediff.methods.barriers import BARRIERS, Barrier, StepValues
from erasediff.methods.erasediff import barrier_of
from erasediff.parallel.gradient_store import combine_
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, clip_combination, gradient_gram

EXAMPLES = settings(max_examples=150, deadline=None)
DRAWN = {
    "seed": st.integers(0, 2**31),
    "size": st.integers(2, 30),
    "scale": st.floats(-3, 3),
    "alignment": st.floats(-1, 1),
}


def drawn_pair(seed: int, size: int, scale: float, alignment: float) -> tuple[Tensor, Tensor]:
    """r and g in fp64, of any ratio of norms and any angle."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(size, generator=generator, dtype=torch.float64)
    r = 10**scale * (torch.randn(size, generator=generator, dtype=torch.float64) + 10 * alignment * g)
    return r, g


def combined(barrier: Barrier, r: Tensor, g: Tensor, **losses: Tensor) -> Tensor:
    a, b = barrier.coefficients(StepValues(gradient_gram([r], [g]), **losses))
    assert a.dtype == b.dtype == torch.float64
    assert a.shape == b.shape == ()
    return a * r + b * g


@EXAMPLES
@given(**DRAWN, max_norm=st.none() | st.floats(1e-2, 1e2))
def test_fused_rules_equal_their_tensor_operations(
    seed: int, size: int, scale: float, alignment: float, max_norm: float | None
) -> None:
    r, g = drawn_pair(seed, size, scale, alignment)
    values = StepValues(gradient_gram([r], [g]), gap=torch.tensor(0.3))
    for barrier in (Norm(0.3), Gap(0.5), Fixed(0.7), Cosine(0.4)):
        fused = barrier.constraint(values, max_norm)
        composed = Barrier.constraint(barrier, values, max_norm)
        torch.testing.assert_close(fused.multiplier, composed.multiplier[1], rtol=1e-6, atol=1e-12)
        for one, other in zip(fused[1:], composed[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)


@EXAMPLES
@given(**DRAWN)
def test_conflict_is_gradient_surgery(seed: int, size: int, scale: float, alignment: float) -> None:
    """PCGrad as its algorithm is written: each gradient projected onto the normal plane of the other, then summed."""
    r, g = drawn_pair(seed, size, scale, alignment)
    projected_r, projected_g = r.clone(), g.clone()
    if r @ g < 0:
        projected_r -= (r @ g) / (g @ g) * g
        projected_g -= (g @ r) / (r @ r) * r
    delta = combined(Conflict(), r, g)
    torch.testing.assert_close(delta, projected_r + projected_g, rtol=1e-9, atol=1e-9 * float(r.norm() + g.norm()))
    slack = 1e-9 * float((r.norm() + g.norm()) ** 2)
    assert float(delta @ r) >= -slack
    assert float(delta @ g) >= -slack
    weighted = combined(Conflict(eta=2.0), r, g)
    torch.testing.assert_close(weighted, combined(Conflict(), r, 2 * g), rtol=1e-9, atol=1e-9 * float(weighted.norm()))


@EXAMPLES
@given(**DRAWN)
def test_nash_solves_the_bargaining_equations(seed: int, size: int, scale: float, alignment: float) -> None:
    """G alpha = 1 / alpha; both losses fall by the same share, along a direction of one length."""
    r, g = drawn_pair(seed, size, scale, alignment)
    cosine = float(r @ g / (r.norm() * g.norm()))
    if cosine < -1 + 1e-6:
        return
    gram = gradient_gram([r], [g])
    a, b = Nash().coefficients(StepValues(gram))
    rr, rf, ff = gram
    assert float(a * (rr * a + rf * b)) == pytest.approx(1, rel=1e-6)
    assert float(b * (rf * a + ff * b)) == pytest.approx(1, rel=1e-6)
    delta = a * r + b * g
    assert float(delta @ r / r.norm()) == pytest.approx(float(delta @ g / g.norm()), rel=1e-6)
    assert float(delta.norm()) == pytest.approx(math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_nash_maximises_the_product_of_gains_over_the_ball(seed: int) -> None:
    """No other direction has a larger log <r,u> + log <g,u>: of a fine grid in the plane of both, and around it."""
    r, g = drawn_pair(seed, 6, 0.7, -0.05 * seed)

    def gains(directions: Tensor) -> Tensor:
        units = directions / directions.norm(dim=1, keepdim=True)
        return torch.log((units @ r).clamp_min(0)) + torch.log((units @ g).clamp_min(0))

    delta = combined(Nash(), r, g)
    best = float(gains(delta[None]))
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    across = g - (r @ g) / (r @ r) * r
    plane = angles.cos()[:, None] * r / r.norm() + angles.sin()[:, None] * across / across.norm()
    noise = torch.randn(1000, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert float(gains(plane).max()) == pytest.approx(best, abs=1e-5)
    assert float(gains(plane).max()) <= best + 1e-12
    assert float(gains(delta + 0.01 * noise).max()) <= best + 1e-12


def test_nash_stays_where_no_direction_helps_both() -> None:
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    values = StepValues(gradient_gram([-3 * g], [g]))
    constraint = Nash().constraint(values, 1.0)
    assert constraint.multiplier.tolist() == [0, 0]
    assert float(constraint.norm) == 0
    assert constraint.finite


@pytest.mark.parametrize("barrier", [Conflict(), Nash()])
def test_a_gradient_of_zero_leaves_the_other(barrier: Barrier) -> None:
    g, zero = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for r, f in ((g, zero), (zero, g), (zero, zero)):
        constraint = barrier.constraint(StepValues(gradient_gram([r], [f])), None)
        a, b = constraint.multiplier.tolist()
        delta = float(constraint.clip_scale) * (a * r + b * f)
        direction = r + f if isinstance(barrier, Conflict) else (r + f) / max(5.0, 1e-9)
        torch.testing.assert_close(delta, direction, rtol=1e-6, atol=0)
        assert constraint.finite
        assert float(constraint.norm) == pytest.approx(float(delta.norm()), rel=1e-6)


@EXAMPLES
@given(**DRAWN, max_norm=st.floats(1e-2, 1e2), a=st.floats(0.1, 10), b=st.floats(-5, 5))
def test_the_update_is_the_clipped_combination(
    seed: int, size: int, scale: float, alignment: float, max_norm: float, a: float, b: float
) -> None:
    """clip_scale (a r + b g), as the stores form it, is what clip_grad_norm_ makes of a r + b g."""
    r, g = drawn_pair(seed, size, scale, alignment)
    parameter = nn.Parameter(torch.zeros_like(r))
    parameter.grad = a * r + b * g
    norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm)
    coefficients = torch.tensor([a, b], dtype=torch.float64)
    constraint = clip_combination(gradient_gram([r], [g]), coefficients, max_norm=max_norm)
    bound = float(a * r.norm() + abs(b) * g.norm())
    assert float(constraint.norm) == pytest.approx(float(norm), rel=1e-5, abs=1e-6 * bound)
    delta = r.clone()
    combine_([delta], [g.clone()], constraint)
    torch.testing.assert_close(delta, parameter.grad, rtol=1e-4, atol=1e-5 * min(bound, max_norm))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("barrier", [Conflict(), Nash(), Threshold(1.0)])
def test_values_that_are_not_finite_are_told(barrier: Barrier, bad: float) -> None:
    gram = torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    assert not barrier.constraint(StepValues(gram, forget_loss=torch.tensor(1.0)), 1.0).finite


def test_threshold_finds_the_constrained_optimum() -> None:
    """min |x - p|^2 s.t. |x - q|^2 <= level in fp64: the point of the segment from p to q at that distance of q."""
    p, q = (torch.tensor(point, dtype=torch.float64) for point in ([0.0, 0.0], [3.0, 4.0]))
    level, x = 4.0, torch.zeros(2, dtype=torch.float64)
    barrier = Threshold(level, eta=0.05)
    for _ in range(3000):
        r, g, loss = 2 * (x - p), 2 * (x - q), (x - q).square().sum()
        values = StepValues(gradient_gram([r], [g]), forget_loss=loss)
        a, b = barrier.coefficients(values)
        x = x - 0.02 * (a * r + b * g)
        barrier.advance(values, torch.tensor(True))
    torch.testing.assert_close(x, q - 2.0 / 5.0 * q, rtol=1e-6, atol=1e-6)
    # Stationarity, r + lambda g = 0, at that point.
    assert float(barrier.multiplier) == pytest.approx(3.0 / 2.0, rel=1e-5)


def test_threshold_is_off_where_the_level_is_met_and_survives_a_skipped_step() -> None:
    barrier = Threshold(1.0, eta=0.5)
    gram = torch.ones(3, dtype=torch.float64)

    def advance(loss: float, *, finite: bool = True) -> float:
        barrier.advance(StepValues(gram, forget_loss=torch.tensor(loss)), torch.tensor(finite))
        return float(barrier.multiplier)

    assert advance(0.5) == 0
    assert advance(3.0) == 1.0
    assert advance(math.nan, finite=False) == 1.0
    assert advance(0.5) == 0.75


Batches = Callable[..., dict[str, Tensor]]
NEW = [Conflict(), Nash(), Threshold(0.2, eta=0.5)]


@pytest.mark.parametrize("barrier", NEW, ids=lambda barrier: barrier.name)
@pytest.mark.parametrize("optimizer", [ConstrainedAdamW, torch.optim.AdamW])
def test_a_run_resumes_to_the_bit(
    make_model: Callable[[], nn.Module],
    process: Process,
    make_batch: Batches,
    barrier: Barrier,
    optimizer: type[torch.optim.Optimizer],
) -> None:
    def start() -> EraseDiff:
        model = make_model()
        parameters = optimizer(model.parameters(), lr=1e-2)
        return EraseDiff(model, parameters, process=process, barrier=copy.deepcopy(barrier))

    def steps(method: EraseDiff, first: int, last: int) -> None:
        for step in range(first, last):
            assert method.step(make_batch(1, seed=step), make_batch(2, seed=step)).finite

    whole, interrupted, resumed = start(), start(), start()
    steps(whole, 0, 6)
    steps(interrupted, 0, 3)
    resumed.model.load_state_dict(interrupted.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    steps(resumed, 3, 6)
    for expected, actual in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, actual)
    assert whole.scalars().keys() == resumed.scalars().keys()
    assert all(torch.equal(value, resumed.scalars()[name]) for name, value in whole.scalars().items())


def test_a_sharded_run_carries_the_dual_variable_in_its_scalars(
    make_model: Callable[[], nn.Module], process: Process, make_batch: Batches
) -> None:
    model = make_model()
    method = EraseDiff(model, ConstrainedSGD(model.parameters(), lr=0.1), process=process, barrier=Threshold(0.1))
    method.step(make_batch(1), make_batch(2))
    assert float(method.scalars()["barrier.multiplier"]) > 0
    twin = make_model()
    other = EraseDiff(twin, ConstrainedSGD(twin.parameters(), lr=0.1), process=process, barrier=Threshold(0.1))
    other.load_scalars(method.scalars())
    assert torch.equal(other.barrier.scalars()["multiplier"], method.barrier.scalars()["multiplier"])


def test_every_rule_is_found_by_the_name_of_its_file() -> None:
    assert {name: rule.name for name, rule in BARRIERS.items()} == {name: name for name in barrier_names()}
    assert {"norm", "gap", "fixed", "cosine", "conflict", "nash", "threshold"} <= BARRIERS.keys()


def test_a_new_file_is_a_new_barrier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The configuration and the command line know it without being told."""
    (tmp_path / "mean.py").touch()
    monkeypatch.setattr("erasediff.config.method_index.BARRIERS_FOLDER", tmp_path)
    barrier_names.cache_clear()
    try:
        assert load_config(None, {"unlearn.barrier": "mean"}).unlearn.barrier == "mean"
        with pytest.raises(UserError, match="'mean'"):
            load_config(None, {"unlearn.barrier": "norm"})
    finally:
        barrier_names.cache_clear()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"barrier": "fixed", "eta": 2.0}, Fixed(2.0)),
        ({"barrier": "conflict"}, Conflict(1.0)),
        ({"barrier": "conflict", "eta": 0.5}, Conflict(0.5)),
        ({"barrier": "nash"}, Nash()),
    ],
)
def test_a_configuration_names_the_rule(values: dict[str, object], expected: Barrier) -> None:
    assert barrier_of(UnlearnConfig(**values)) == expected


def test_a_configuration_sets_what_the_rule_takes() -> None:
    threshold = barrier_of(UnlearnConfig(barrier="threshold", level=0.3, eta=0.2))
    assert isinstance(threshold, Threshold)
    assert (threshold.level, threshold.eta) == (0.3, 0.2)
    with pytest.raises(UserError, match="needs a level"):
        barrier_of(UnlearnConfig(barrier="threshold"))
    with pytest.raises(UserError, match="takes no eta"):
        barrier_of(UnlearnConfig(barrier="nash", eta=0.2))
    with pytest.raises(UserError, match="takes no level"):
        barrier_of(UnlearnConfig(barrier="norm", eta=0.2, level=0.2))


@pytest.mark.parametrize(
    ("rule", "options"),
    [(Conflict, {"eta": 0.0}), (Threshold, {"level": 0.0}), (Threshold, {"level": 1.0, "eta": 0.0})],
)
def test_numbers_out_of_range_are_refused(rule: type[Barrier], options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        rule(**options)
