"""A step that raised leaves nothing behind: tried again, it is the step that it would have been, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("failure_cases.py")
SMALL = {"reduce_bucket_size": 30000, "stage3_param_persistence_threshold": 2000}
CHOSEN: list[tuple[int, dict[str, Any]]] = [
    (1, {"layout": "local"}),
    (2, {"layout": "ddp", "gradient_as_bucket_view": True, "barrier": "gap"}),
    (2, {"layout": "fsdp", "barrier": "gap"}),
    (2, {"layout": "zero-0"}),
    (2, {"layout": "zero-1", "zero": SMALL}),
    (2, {"layout": "zero-2", "zero": SMALL, "own_reduction": False}),
    (2, {"layout": "zero-2", "offload": "optimizer"}),
    (2, {"layout": "zero-3", "zero": SMALL, "barrier": "gap"}),
]
OTHERS: list[tuple[int, dict[str, Any]]] = [
    (2, {"layout": "ddp"}),
    (2, {"layout": "zero-0", "bf16": True}),
    (2, {"layout": "zero-1", "offload": "optimizer"}),
    (2, {"layout": "zero-2", "zero": SMALL, "barrier": "gap"}),
    # With gap DeepSpeed has seen the order of modules in the inner solve: until it has, its hooks run around them, and
    # gradients are summed in another order.
    (2, {"layout": "zero-3", "offload": "both", "barrier": "gap"}),
    (2, {"layout": "zero-3", "zero": {**SMALL, "stage3_max_reuse_distance": 1000}}),
    *((2, {"layout": f"zero-{stage}", "zero": SMALL, "own_reduction": False}) for stage in (0, 1, 3)),
]
LAYOUTS = [*CHOSEN, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]


@pytest.mark.parametrize(("size", "options"), LAYOUTS, ids=str)
def test_a_failed_step_that_is_tried_again_is_the_step_it_would_have_been(
    run_on: Callable[..., list[Any]], size: int, options: dict[str, Any]
) -> None:
    untroubled = run_on(size, CASES, "untroubled", options)
    for rank, expected in zip(run_on(size, CASES, "troubled", options), untroubled, strict=True):
        assert not rank["changed"], "a failed step must leave the engine's functions as they were"
        assert rank["reports"] == expected["reports"]
        for name, weight in expected["weights"].items():
            assert weight is None or torch.equal(rank["weights"][name], weight), name


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_deepspeeds_own_reduction_gives_what_ours_does(run_on: Callable[..., list[Any]], stage: int) -> None:
    options = {"layout": f"zero-{stage}", "zero": SMALL}
    ours, theirs = (
        run_on(2, CASES, "untroubled", {**options, "own_reduction": own_reduction})[0]
        for own_reduction in (True, False)
    )
    assert theirs["reports"] == [pytest.approx(report, rel=1e-6, abs=1e-7) for report in ours["reports"]]
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(theirs["weights"][name], weight, rtol=1e-5, atol=1e-7)
