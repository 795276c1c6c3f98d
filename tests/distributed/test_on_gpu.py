"""One process on a GPU under every stack: what the CPU computes, in bf16 too, and from the command line.

Steps in fp32 beside plain PyTorch's on the same GPU are in ``test_gradients_layouts``; with several GPUs, the other
tests of this folder use them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, curve, run, weights
from placing import GPUS

CASES = Path(__file__).with_name("cases.py")
CHECKPOINTS = Path(__file__).with_name("checkpoint_cases.py")
RunOn = Callable[..., list[Any]]
ON_THE_CPU = GPUS + 1
"""More processes than there are GPUs."""

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]


@pytest.mark.parametrize("layout", ["local", "ddp", "fsdp", "zero-0", "zero-1", "zero-2", "zero-3"])
def test_steps_are_those_of_the_cpu(run_on: RunOn, layout: str) -> None:
    """SGD, since Adam moves a weight whose gradient is rounding noise by the learning rate."""
    options = {"optimizer": "ConstrainedSGD"}
    expected = run_on(1, CASES, "train", 3, {"layout": "local", **options}, widest=ON_THE_CPU)[0]
    actual = run_on(1, CASES, "train", 3, {"layout": layout, **options})[0]
    for step, (report, reference) in enumerate(zip(actual["reports"], expected["reports"], strict=True)):
        assert report == pytest.approx(reference, rel=1e-3, abs=1e-5), step
    # Of all weights at once, a failure names the one that is off.
    torch.testing.assert_close(actual["weights"], expected["weights"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        ("ddp", {}),
        ("fsdp", {}),
        ("zero-0", {}),
        ("zero-1", {}),
        ("zero-2", {}),
        ("zero-2", {"offload": "optimizer"}),
        ("zero-3", {}),
        ("zero-3", {"offload": "both"}),
    ],
)
def test_bf16_weights_are_roundings_of_fp32_masters(run_on: RunOn, layout: str, own: dict[str, Any]) -> None:
    options = {"bf16": True, "lr": 1e-7}
    expected = run_on(1, CASES, "masters", {"layout": "local", **options})[0]
    result = run_on(1, CASES, "masters", {"layout": layout, **options, **own})[0]
    for report, reference in zip(result["reports"], expected["reports"], strict=True):
        assert report["multiplier"] == pytest.approx(reference["multiplier"], rel=0.05)
    assert result["dtypes"] == {torch.float32}
    numel = sum(weight.numel() for weight in result["weights"].values())
    assert result["moved"] > 0.9 * numel
    assert result["weights_moved"] < 0.1 * numel
    for name, start, rounded in result["rounded"]:
        stored = result["weights"][name].flatten()[start : start + rounded.numel()]
        assert torch.equal(stored, rounded.flatten().to(stored.dtype)), name


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "zero-1", "zero-2", "zero-3"])
def test_a_step_that_is_not_finite_is_skipped(run_on: RunOn, layout: str) -> None:
    result = run_on(1, CASES, "steps_with_one_poisoned", {"layout": layout}, "forget")[0]
    assert result["reports"] == [(True, 0), (False, 1), (True, 1)]
    assert result["same"]
    assert result["moved"]


def test_any_layout_goes_on_from_any_other_and_from_the_cpu(run_on: RunOn, tmp_path: Path) -> None:
    chain = [("zero-2", ON_THE_CPU), *((layout, 1) for layout in ("local", "zero-3", "fsdp", "zero-1", "ddp"))]
    whole = run_on(1, CHECKPOINTS, "go_on", str(tmp_path / "whole"), 0, len(chain), {"layout": "local"})[0]
    for step, (layout, widest) in enumerate(chain):
        place = (str(tmp_path), step, step + 1, {"layout": layout})
        reports = run_on(1, CHECKPOINTS, "go_on", *place, widest=widest)[0]
        assert reports[0] == pytest.approx(whole[step], rel=1e-3, abs=1e-5), layout


@pytest.mark.parametrize(
    "flags", [("ddp",), ("fsdp",), ("zero", "--stage", 2), ("zero", "--stage", 3), ("zero", "--offload", "optimizer")]
)
def test_a_run_of_one_rank_is_a_run_without_ranks(base: Path, tmp_path: Path, flags: tuple[object, ...]) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    unlearn = ("unlearn", "--model", base, "--config", tmp_path / "tiny.yaml")
    run(*unlearn, "--out", tmp_path / "plain", widest=1)
    run(*unlearn, "--out", tmp_path / "rank", "--launch", *flags, "--processes", 1, widest=1)
    for step, (found, expected) in enumerate(zip(curve(tmp_path / "rank"), curve(tmp_path / "plain"), strict=True)):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), step
    torch.testing.assert_close(weights(tmp_path / "rank"), weights(tmp_path / "plain"), rtol=0, atol=2e-5)
