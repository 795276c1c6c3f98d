"""Run folders that are resumed: settings, metrics, manifests, states, checkpoints missing or mixed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import command, fuzzed, refusal, tree
from hypothesis import strategies as st
from mutations import Change, apply, changes
from seeds import copy_of, make_run

from erasediff.io.jsonl import MetricsFile
from erasediff.training.checkpoint import Checkpoint
from erasediff.training.run_dir import RunFolder, RunPlace


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("finished") / "finished")


def resumed(folder: Path, resume: str) -> None:
    """What is read of a run before its job is made, and its newest checkpoint."""
    place = RunPlace.asked_for(None, resume)
    config = RunFolder.read_config(place.path)
    run = RunFolder.resume(place.path, config, place.checkpoint)
    if run.resume_from is not None:
        run.metrics.continue_after(run.resume_from.step)
        state = run.resume_from.load()
        assert isinstance(state, dict)
    list(MetricsFile(folder / "metrics.jsonl").read())


@fuzzed(60, found=changes(), which=st.sampled_from(("run", "run/checkpoint-3", "run/checkpoint-2", "run/model")))
def test_reading_of_runs(found: list[Change], which: str, finished: Path) -> None:
    with copy_of(finished) as folder:
        apply(folder / "run", found)
        refusal(lambda: resumed(folder / "run", str(folder / which)))


@fuzzed(12, found=changes(most=2), step=st.sampled_from((2, 3)), mixed=st.booleans())
def test_resumed_runs(found: list[Change], step: int, mixed: bool, finished: Path) -> None:
    """A resumed run ends well or is refused; refused, nothing is written but what a run repairs."""
    with copy_of(finished) as folder:
        shutil.rmtree(folder / "run/model", ignore_errors=True)
        shutil.rmtree(folder / "run/checkpoint-4", ignore_errors=True)
        if mixed:
            shutil.copytree(folder / "run/checkpoint-2", folder / "run/checkpoint-3", dirs_exist_ok=True)
        apply(folder / "run", found)
        before = tree(folder)
        ended = command("train", "--resume", folder / "run" / f"checkpoint-{step}")
        if ended.code == 2:
            left = tree(folder).keys() ^ before.keys()
            assert not left, left
        assert Checkpoint.newest(folder / "run") is not None or ended.code
