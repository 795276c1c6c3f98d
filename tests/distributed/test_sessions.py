"""A text-to-image run under ZeRO-3 reads its checkpoint in parts, and its frozen teacher too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("session_cases.py")
RunOn = Callable[..., list[Any]]
ZERO_3 = {"distributed.launch": "zero", "distributed.stage": 3}


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_no_rank_holds_the_denoiser_or_its_teacher_whole(
    run_on: RunOn, nano_folder: Callable[[str], Path], tmp_path: Path, train: str
) -> None:
    where, chosen = (str(nano_folder("sd")), str(tmp_path)), {"text_to_image.train": train}
    alone = run_on(1, CASES, "unlearn", *where, chosen, widest=2)[0]
    ranks = run_on(2, CASES, "unlearn", *where, {**chosen, **ZERO_3})
    for rank in ranks:
        assert rank["cuts"] > 200
        assert rank["most"] < 0.2 * rank["total"]
        for report, expected in zip(rank["reports"], alone["reports"], strict=True):
            assert report == pytest.approx(expected, rel=1e-4, abs=1e-7)
    # Adam moves a weight whose gradient is rounding noise by the learning rate, 1e-3: of all, few do.
    off = torch.cat([(ranks[0]["weights"][name] - weight).flatten() for name, weight in alone["weights"].items()])
    assert float(off.square().mean().sqrt()) < 1e-5
    assert float(off.abs().max()) < 1e-3


def test_a_teacher_is_cut_under_fsdp_too(run_on: RunOn, nano_folder: Callable[[str], Path], tmp_path: Path) -> None:
    where = (str(nano_folder("sd")), str(tmp_path))
    alone = run_on(1, CASES, "unlearn", *where, {}, widest=2)[0]
    for rank in run_on(2, CASES, "unlearn", *where, {"distributed.launch": "fsdp"}):
        for report, expected in zip(rank["reports"], alone["reports"], strict=True):
            assert report == pytest.approx(expected, rel=1e-4, abs=1e-7)
