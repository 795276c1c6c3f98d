"""Ranks that are killed while they write, stopped, or cut off: one sentence, and the last checkpoint goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from crash_points import FULL, contents, different, evenly, leftovers, trace_of
from forked_ranks import CUT_SIGNAL, Proxy, Ranks

from erasediff.models import PixelModel
from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import Checkpoint

TINY = """
device: cpu
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
unlearn: {forget: [3], steps: 3, batch_size: 4, lr: 1.0e-5, target: gaussian}
run: {checkpoint_every: 1, keep_checkpoints: 1, log_every: 1}
"""
LAYOUTS = {
    "ddp": ("--launch", "ddp"),
    "fsdp": ("--launch", "fsdp"),
    "zero-2": ("--launch", "zero", "--stage", "2"),
    "zero-3": ("--launch", "zero", "--stage", "3"),
}
TIMEOUT = 5.0
PATIENCE = 60.0
"""Far more than ranks need to notice that one is gone, after the timeout."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.yaml").write_text(TINY)
    PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1).save(folder / "base")
    return folder


def begin(place: Path, out: Path, layout: str, *more: str) -> list[str]:
    model = ("--model", str(place / "base"), "--config", str(place / "tiny.yaml"))
    return ["unlearn", "--no-verdict", *model, *LAYOUTS[layout], "--processes", "2", "--out", str(out), *more]


def resume(place: Path, out: Path, layout: str) -> list[str]:
    """As a launcher's restart: the same command, with ``--resume latest`` once there is a run."""
    more = ("--resume", "latest") if (out / "config.yaml").exists() else ()
    return begin(place, out, layout, *more)


def finish(ranks: Ranks) -> None:
    ended = ranks.finish()
    assert [code for code, _ in ended] == [0, 0], ended


def check_whole(run: Path) -> None:
    for checkpoint in Checkpoint.of_run(run):
        with checkpoint.fragments(ControlPlane()):
            pass


def check_same_result(run: Path, whole: Path) -> None:
    """The files of two runs, and their bits."""
    found, expected = (
        {name: content for name, content in contents(folder).items() if name != "config.yaml"}
        for folder in (run, whole)
    )
    assert different(found, expected) == []


def sentence_of(errors: str) -> str:
    said = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in errors
    assert len(said) == 1, errors
    return said[0]


def kill_ranks(place: Path, tmp_path: Path, layout: str, rank: int, most: int | None) -> Counter[str]:
    """Kill ``rank`` at its calls, end the other, resume, and compare the bits with those of a run without a kill."""
    whole = tmp_path / "whole"
    finish(Ranks(begin(place, whole / "run", layout), whole))
    calls = trace_of(whole, f"rank {rank}")
    kills: Counter[str] = Counter()
    for number in evenly(len(calls), most):
        root = tmp_path / f"kill-{number}"
        fatal = [number if other == rank else 0 for other in range(2)]
        ranks = Ranks(begin(place, root / "run", layout), root, fatal)
        ranks.wait_for_one()
        codes = [code for code, _ in ranks.end()]
        call = trace_of(root, f"rank {rank}")[-1]
        where = f"{layout}, rank {rank}, {number} of {len(calls)}: killed at {call}"
        assert codes[rank] == -signal.SIGKILL, where
        kills[call.split()[0]] += 1
        check_whole(root / "run")
        finish(Ranks(resume(place, root / "run", layout), root))
        check_same_result(root / "run", whole / "run")
        assert leftovers(root) == [], where
        shutil.rmtree(root)
    return kills


def test_a_rank_that_is_killed_while_it_writes_loses_nothing(place: Path, tmp_path: Path) -> None:
    assert kill_ranks(place, tmp_path, "fsdp", rank=1, most=2).total() == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_call_of_a_rank(place: Path, tmp_path: Path, layout: str, rank: int) -> None:
    """``ERASEDIFF_KILLS`` limits the kills, which are evenly spaced then."""
    most = os.environ.get("ERASEDIFF_KILLS")
    kills = kill_ranks(place, tmp_path, layout, rank, None if most is None else int(most))
    print(f"{layout}, rank {rank}: {kills.total()} kills: {dict(kills)}")


def long_run(place: Path, out: Path, layout: str) -> list[str]:
    steps = ("--steps", "100000", "--set", "run.checkpoint_every=5", "--set", f"distributed.timeout={TIMEOUT}")
    return begin(place, out, layout, *steps)


def wait_for_checkpoint(ranks: Ranks, run: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while Checkpoint.newest(run) is None:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in ranks.processes), ranks.end()
        time.sleep(0.02)


def goes_on(place: Path, root: Path, layout: str) -> None:
    """The run resumes from a whole checkpoint, and saves another."""
    check_whole(root / "run")
    before = Checkpoint.newest(root / "run")
    assert before is not None
    ranks = Ranks([*long_run(place, root / "run", layout), "--resume", "latest"], root)
    deadline = time.monotonic() + PATIENCE
    while (now := Checkpoint.newest(root / "run")) is None or now <= before:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in ranks.processes), ranks.end()
        time.sleep(0.02)
    ranks.end()
    lines = (root / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run(place: Path, tmp_path: Path, layout: str, stopped: int) -> None:
    root = tmp_path / "stopped"
    ranks = Ranks(long_run(place, root / "run", layout), root)
    wait_for_checkpoint(ranks, root / "run")
    began = time.monotonic()
    ranks.processes[stopped].send_signal(signal.SIGSTOP)
    ranks.wait_for_one(TIMEOUT + PATIENCE)
    seconds = time.monotonic() - began
    code, errors = ranks.end()[1 - stopped]
    assert code not in (0, None)
    # In a collective, or in an exchange about a checkpoint.
    sentence = sentence_of(errors)
    assert "has lost another process" in sentence or "waited 5 s for another process in vain" in sentence
    print(f"{layout}, rank {stopped} stopped: ended with {code} after {seconds:.1f} s")
    goes_on(place, root, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_connections_that_break_end_the_run(place: Path, tmp_path: Path, layout: str) -> None:
    root = tmp_path / "cut"
    ranks = Ranks(long_run(place, root / "run", layout), root)
    wait_for_checkpoint(ranks, root / "run")
    ranks.processes[1].send_signal(CUT_SIGNAL)
    ended = ranks.finish(TIMEOUT + PATIENCE)
    assert all(code not in (0, None, -signal.SIGKILL) for code, _ in ended), ended
    assert "--resume latest continues" in sentence_of("".join(errors for _, errors in ended))
    goes_on(place, root, layout)


@pytest.mark.slow
def test_a_store_that_answers_no_more_ends_the_run(place: Path, tmp_path: Path) -> None:
    """The network between a rank and the key-value store is cut: no connection ends, and nothing arrives."""
    root = tmp_path / "frozen"
    proxy = Proxy()
    ranks = Ranks(long_run(place, root / "run", "fsdp"), root, proxy=proxy)
    wait_for_checkpoint(ranks, root / "run")
    proxy.is_frozen.set()
    ended = ranks.finish(TIMEOUT + PATIENCE)
    proxy.close()
    assert all(code not in (0, None, -signal.SIGKILL) for code, _ in ended), ended
    for _, errors in ended:
        sentence_of(errors)
    goes_on(place, root, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(
    place: Path, tmp_path: Path, layout: str, rank: int
) -> None:
    whole = tmp_path / "whole"
    finish(Ranks(begin(place, whole / "run", layout), whole))
    calls = trace_of(whole, f"rank {rank}")
    first = next(number for number, call in enumerate(calls, start=1) if "checkpoint-2" in call)
    for number in sorted({first, (first + len(calls)) // 2, len(calls) - 8} & set(range(first, len(calls) + 1))):
        root = tmp_path / f"full-{number}"
        fatal = [number if other == rank else 0 for other in range(2)]
        ended = Ranks(begin(place, root / "run", layout), root, fatal, **{FULL: "yes"}).finish()
        where = f"{layout}, rank {rank}, full from {number} of {len(calls)}, {calls[number - 1]}: {ended}"
        assert [code for code, _ in ended] == [2, 2], where
        assert "The disk is full" in sentence_of("".join(errors for _, errors in ended)), where
        check_whole(root / "run")
        assert Checkpoint.newest(root / "run") is not None, where
        finish(Ranks(resume(place, root / "run", layout), root))
        check_same_result(root / "run", whole / "run")
        assert leftovers(root) == [], where
