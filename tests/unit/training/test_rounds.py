"""Runs in rounds: the same bits whether interrupted or not, a rate and the same batches for each round."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import folder_weights, run_command
from rich.console import Console

from erasediff.config import load_config
from erasediff.models import PixelModel
from erasediff.training.job import TrainingJob
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.rounds import end_of_round, rate_of_round
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_unlearning import build_unlearning_job

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "unlearn.forget": [3],
    "unlearn.steps": 3,
    "unlearn.batch_size": 4,
    "unlearn.lr": 1e-3,
    "run.checkpoint_every": 2,
}
NEVER, AT_ONCE = {"verdict.forgotten_limit": 0.0}, {"verdict.forgotten_limit": 0.99}
"""An untrained model's samples look like each of six classes now and then, and never all like one."""

pytestmark = pytest.mark.usefixtures("one_thread")


def job(**changes: Any) -> TrainingJob:
    model = PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1)
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return build_unlearning_job(load_config(None, SETTINGS | named), model)


def run(job: TrainingJob, out: Path, *, resuming: bool = False) -> str:
    console = Console(file=io.StringIO(), width=400)
    job.run(RunPlace(out, resuming=resuming), console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = folder_weights(one / "model"), folder_weights(other / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


def test_each_round_repeats_the_schedule_at_twice_the_rate() -> None:
    rate = LearningRate(1e-3, 10, 2, "cosine")
    for step in (0, 3, 9, 10, 13, 29):
        schedule, within = rate_of_round(rate, step)
        assert schedule.at(within) == pytest.approx(2 ** (step // 10) * rate.at(step % 10))


@pytest.mark.parametrize(("step", "end"), [(0, 10), (3, 10), (10, 10), (11, 20), (20, 20)])
def test_a_run_that_resumes_is_in_its_round(step: int, end: int) -> None:
    assert end_of_round(step, 10) == end


def test_a_run_that_has_forgotten_takes_one_round_and_the_bits_of_a_run_of_so_many_steps(tmp_path: Path) -> None:
    run(job(), tmp_path / "steps")
    run(job(unlearn__until="forgotten", **AT_ONCE), tmp_path / "forgotten")
    assert_same(tmp_path / "steps", tmp_path / "forgotten")


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_that_is_killed_in_a_round_ends_in_the_same_bits(tmp_path: Path, stop: int) -> None:
    endless = {"unlearn__until": "forgotten", "unlearn__max_steps": 9, **NEVER}
    printed = run(job(**endless), tmp_path / "whole")
    assert "that is the last of --max-steps" in printed
    killed = job(**endless)
    take = killed.method.step

    def stopping(*batches: Any) -> Any:
        if killed.method.iteration == stop:
            raise KeyboardInterrupt
        return take(*batches)

    killed.method.step = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path / "killed")
    run(job(**endless), tmp_path / "killed", resuming=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_time_that_is_used_up_begins_no_further_round(tmp_path: Path) -> None:
    printed = run(job(unlearn__until="forgotten", unlearn__max_minutes=1e-9, **NEVER), tmp_path / "late")
    assert "--max-minutes are over" in printed
    assert len((tmp_path / "late/metrics.jsonl").read_text().splitlines()) == 3


def test_a_number_of_steps_is_kept_to_unless_asked_otherwise(tmp_path: Path) -> None:
    assert job().rounds is None
    assert job(unlearn__until="forgotten").rounds is not None
    assert job(unlearn__until="forgotten").config.unlearn.until == "forgotten"
    assert job(unlearn__steps=None).rounds is not None
    assert job(unlearn__steps=None, unlearn__until="steps").rounds is None


def test_methods_and_models_without_a_look_refuse_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PixelModel.build(num_classes=None, block_out_channels=(8, 8), layers_per_block=1)
    model.save(tmp_path / "model")
    common = ("--model", tmp_path / "model", "--forget", "3", "--until", "forgotten", "--out", tmp_path / "run")
    assert run_command("unlearn", *common) == 2
    assert "no look can tell" in capsys.readouterr().err
    assert run_command("unlearn", *common, "--method", "finetune") == 2
    assert "unlearn.until" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
