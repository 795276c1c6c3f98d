"""Checkpoints that ranks share: any number of them, in any layout, goes on from any other's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CASES = Path(__file__).with_name("checkpoint_cases.py")
RunOn = Callable[..., list[Any]]

CHAINS = [
    [(2, "zero-2"), (1, "local"), (3, "zero-3"), (2, "fsdp"), (2, "ddp")],
    [(1, "local"), (2, "zero-3"), (3, "ddp"), (1, "zero-1"), (3, "fsdp"), (2, "zero-1")],
]


@pytest.mark.parametrize("chain", CHAINS)
def test_any_layout_goes_on_from_any_other(run_on: RunOn, tmp_path: Path, chain: list[tuple[int, str]]) -> None:
    # Under this barrier there is all that there is under others, and the inner solve's weights.
    each, barrier = 2, "gap"
    options = {"layout": "local", "barrier": barrier}
    whole = run_on(1, CASES, "go_on", str(tmp_path / "whole"), 0, each * len(chain), options, widest=3)[0]
    for place, (size, layout) in enumerate(chain):
        first, last = each * place, each * (place + 1)
        options = {"layout": layout, "barrier": barrier}
        reports = run_on(size, CASES, "go_on", str(tmp_path), first, last, options, widest=3)
        assert all(report == reports[0] for report in reports)
        for found, expected in zip(reports[0], whole[first:last], strict=True):
            assert found == pytest.approx(expected, rel=2e-5, abs=1e-6), (size, layout)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "zero-2"},
        {"layout": "zero-3"},
        {"layout": "zero-3", "zero": {"stage3_max_reuse_distance": 1000}},
    ],
)
def test_a_run_that_is_resumed_ends_with_the_same_bits(run_on: RunOn, tmp_path: Path, options: dict[str, Any]) -> None:
    """A process's first step, of which DeepSpeed has seen nothing before, is like any other."""
    for run, (first, last) in (("whole", (0, 3)), ("resumed", (0, 1)), ("resumed", (1, 3))):
        run_on(2, CASES, "go_on", str(tmp_path / run), first, last, options)
    whole, resumed = (tmp_path / run / "checkpoint-3" for run in ("whole", "resumed"))
    names = sorted(path.name for path in whole.iterdir())
    assert len(names) == 3
    for name in names:
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name


def test_each_rank_writes_its_own_part_alone(run_on: RunOn, tmp_path: Path) -> None:
    for name, layout in (("whole", "ddp"), ("parts", "zero-2")):
        run_on(3, CASES, "go_on", str(tmp_path / name), 0, 1, {"layout": layout})
    sizes = {
        name: sum(path.stat().st_size for path in (tmp_path / name / "checkpoint-1").glob("*.safetensors"))
        for name in ("whole", "parts")
    }
    assert sizes["parts"] == pytest.approx(sizes["whole"], rel=0.1)
    files = [path.stat().st_size for path in (tmp_path / "parts/checkpoint-1").glob("*.safetensors")]
    assert len(files) == 3
    assert max(files) < 0.5 * sizes["parts"]


def test_damage_in_any_rank_s_file_is_the_same_sentence_on_all(run_on: RunOn, tmp_path: Path) -> None:
    options = {"layout": "zero-2"}
    for last in (1, 2):
        run_on(2, CASES, "go_on", str(tmp_path), last - 1, last, options)
    state = tmp_path / "checkpoint-2/state-1-of-2.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    for size in (2, 3):
        told = run_on(size, CASES, "restore_error", str(tmp_path), 2, options)
        assert len(set(told)) == 1
        assert "checkpoint-2 is damaged; continue from the one before it with --resume" in told[0]
    assert set(run_on(3, CASES, "restore_error", str(tmp_path), 1, options)) == {"restored"}


def test_a_checkpoint_of_another_kind_of_run_is_refused(run_on: RunOn, tmp_path: Path) -> None:
    run_on(2, CASES, "go_on", str(tmp_path), 0, 1, {"layout": "zero-2"})
    told = run_on(2, CASES, "restore_error", str(tmp_path), 1, {"layout": "zero-2", "barrier": "gap"})
    assert "holds no inner of" in told[0]


def test_a_full_disk_on_one_rank_is_told_to_all_and_leaves_nothing(run_on: RunOn, tmp_path: Path) -> None:
    run_on(2, CASES, "go_on", str(tmp_path), 0, 1, {"layout": "zero-2"})
    told = run_on(2, CASES, "save_where_one_rank_cannot", str(tmp_path), 2, {"layout": "zero-2"})
    assert len(set(told)) == 1
    assert "The disk is full" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert json.loads((tmp_path / "checkpoint-1/manifest.json").read_text())["step"] == 1
