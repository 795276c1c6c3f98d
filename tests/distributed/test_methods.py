"""Every method that ranks can share does what it does on one process, and goes on in another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("method_cases.py")
RunOn = Callable[..., list[Any]]
STEPS = 2


@pytest.fixture(scope="module")
def alone(run_on: RunOn) -> dict[str, Any]:
    return run_on(1, CASES, "train_all", STEPS, {"layout": "local"}, widest=3)[0]


@pytest.mark.parametrize(("size", "layout"), [(3, "ddp"), (2, "fsdp"), (2, "zero-2"), (2, "zero-3")])
def test_other_methods_do_in_ranks_what_they_do_alone(
    run_on: RunOn, alone: dict[str, Any], size: int, layout: str
) -> None:
    results = run_on(size, CASES, "train_all", STEPS, {"layout": layout}, widest=3)
    for name, expected in alone.items():
        found = results[0][name]
        assert all(result[name]["reports"] == found["reports"] for result in results)
        for report, reference in zip(found["reports"], expected["reports"], strict=True):
            assert report == pytest.approx(reference, rel=1e-5, abs=1e-7), name
        for key, weight in expected["weights"].items():
            # An element at the threshold of a mask may fall on its other side: it then moves by one step or none.
            apart = (found["weights"][key] - weight).abs() > 1e-6 * weight.abs().max() + 1e-9
            assert int(apart.sum()) <= (2 if name == "salun" else 0), (name, key)


def test_the_masked_share_of_weights_stays_in_every_layout(run_on: RunOn, alone: dict[str, Any]) -> None:
    before = run_on(1, CASES, "train_all", 0, {"layout": "local"}, widest=3)[0]["salun"]["weights"]
    after = alone["salun"]["weights"]
    moved = sum(int((weight != before[key]).sum()) for key, weight in after.items())
    assert 0.25 < moved / sum(weight.numel() for weight in after.values()) <= 0.31


@pytest.mark.parametrize("name", ["esd", "selective-amnesia", "threshold"])
def test_a_method_s_own_state_goes_on_in_another_layout(run_on: RunOn, tmp_path: Path, name: str) -> None:
    whole = run_on(1, CASES, "go_on", str(tmp_path / "whole"), name, 0, 6, {"layout": "local"}, widest=3)[0]
    for place, (size, layout) in enumerate([(2, "zero-2"), (1, "local"), (3, "ddp")]):
        first, last = 2 * place, 2 * place + 2
        reports = run_on(size, CASES, "go_on", str(tmp_path), name, first, last, {"layout": layout}, widest=3)[0]
        for found, expected in zip(reports, whole[first:last], strict=True):
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-6), (size, layout)
