"""Runs that are killed, stopped and resumed by the real command line, against one that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked, erasediff
from helpers import succeed

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# On a GPU, convolutions and attention add up in no fixed order.
TINY = """
device: cpu
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
train: {steps: 60, batch_size: 16}
unlearn:
  {forget: [3], steps: 40, batch_size: 8, barrier: gap, target: uniform, inner_steps: 2, inner_refresh_every: 3}
run: {checkpoint_every: 7, keep_checkpoints: 2, log_every: 1}
"""
SECONDS_TO_WAIT = 120


def start(*arguments: object) -> Forked:
    return Forked(erasediff, list(map(str, arguments)), ENVIRONMENT)


def wait_for_step(process: Forked, run: Path, step: int) -> None:
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def base(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run that nobody disturbs."""
    run = tmp_path_factory.mktemp("base") / "run"
    succeed("train", "--out", run, "--config", settings)
    return run


def test_unlearning_killed_at_a_random_step_ends_with_the_same_bits(settings: Path, base: Path, tmp_path: Path) -> None:
    begin = ("unlearn", "--model", base / "model", "--config", settings, "--set", "unlearn.moments=8-bit")
    succeed(*begin, "--out", tmp_path / "whole")

    run = tmp_path / "killed"
    process = start(*begin, "--out", run)
    wait_for_step(process, run, random.randint(1, 33))
    process.kill()
    process.communicate()
    assert not (run / "model").exists()

    resumed = start("unlearn", "--resume", "latest", "--out", run)
    _, errors = resumed.communicate(timeout=SECONDS_TO_WAIT)
    assert resumed.returncode == 0, errors
    assert contents(run) == contents(tmp_path / "whole")


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(settings: Path, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    process = start("train", "--out", run, "--config", settings)
    wait_for_step(process, run, random.randint(1, 45))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS_TO_WAIT)
    assert process.returncode == 130
    assert output == ""
    assert "Traceback" not in errors
    assert f"erasediff train --out {run} --config {settings} --resume latest" in errors
    assert not (run / "model").exists()

    succeed("train", "--resume", run)
    assert contents(run / "model") == contents(base / "model")
    assert (run / "metrics.jsonl").read_bytes() == (base / "metrics.jsonl").read_bytes()
    final = Path("checkpoint-60", "state.safetensors")
    assert (run / final).read_bytes() == (base / final).read_bytes()


def test_a_second_ctrl_c_stops_at_once(settings: Path, tmp_path: Path) -> None:
    """Two signals while a step takes long: the checkpoint that the first asked for is not written."""
    run = tmp_path / "stopped"
    code = f"""
import sys, time
import erasediff.methods.baselines as finetune
original = finetune.FineTune.step
def slow(self, retain, forget=None):
    report = original(self, retain, forget)
    if self.iteration == 9:
        print("in a long step", file=sys.__stdout__, flush=True)
        time.sleep({SECONDS_TO_WAIT})
        print("over", file=sys.__stdout__, flush=True)
    return report
finetune.FineTune.step = slow
sys.argv = ["erasediff", "train", "--out", {str(run)!r}, "--config", {str(settings)!r}]
from erasediff.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in a long step\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS_TO_WAIT)
    assert output == ""
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-7"]
