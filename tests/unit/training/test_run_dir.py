"""Run folders: resuming, kept checkpoints, and errors for damage."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from erasediff.config import Config, load_config
from erasediff.errors import UserError
from erasediff.io.state_file import HostState
from erasediff.io.temporary_names import temporary_name
from erasediff.training.checkpoint import Checkpoint
from erasediff.training.run_dir import RunFolder, RunPlace


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((1000,), float(step))}


def save(run: RunFolder, step: int) -> None:
    run.save_checkpoint(step, lambda checkpoint: checkpoint.save(HostState.copy_of(state_of(step))), keep=2)


def loaded(run: RunFolder) -> Any:
    assert run.resume_from is not None
    return run.resume_from.load()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run", Config())
    for step in (10, 20, 30):
        save(run, step)
    return run


def checkpoint_names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.path.iterdir() if path.name.startswith("checkpoint"))


def test_only_the_newest_checkpoints_are_kept(run: RunFolder) -> None:
    assert checkpoint_names(run) == ["checkpoint-20", "checkpoint-30"]
    save(run, 100)
    assert checkpoint_names(run) == ["checkpoint-100", "checkpoint-30"]


def test_resume_takes_the_newest_or_the_one_asked_for(run: RunFolder) -> None:
    assert loaded(RunFolder.resume(run.path, Config()))["step"] == 30
    assert loaded(RunFolder.resume(run.path, Config(), Checkpoint.at(run.path / "checkpoint-20")))["step"] == 20


def test_resume_before_the_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", Config())
    assert RunFolder.resume(run.path, Config()).resume_from is None


def test_a_new_run_needs_an_empty_place(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--resume latest"):
        RunFolder.create(run.path, Config())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not empty"):
        RunFolder.create(tmp_path / "file", Config())


def test_resume_refuses_settings_that_change_the_results(run: RunFolder) -> None:
    with pytest.raises(UserError, match=r"another train\.lr and seed|another seed and train\.lr"):
        RunFolder.resume(run.path, load_config(None, {"train.lr": 1.0, "seed": 1}))
    RunFolder.resume(run.path, load_config(None, {"run.checkpoint_every": 3}))
    assert RunFolder.read_config(run.path).run.checkpoint_every == 3
    RunFolder.resume(run.path, load_config(None, {"distributed.launch": "zero"}))


def test_resume_removes_what_a_kill_left(run: RunFolder) -> None:
    half = run.path / temporary_name("checkpoint-40")
    half.mkdir()
    RunFolder.resume(run.path, Config())
    assert not half.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "no state", "no manifest", "bad manifest", "renamed"])
def test_a_damaged_checkpoint_is_one_sentence_with_a_way_out(run: RunFolder, damage: str) -> None:
    newest = run.path / "checkpoint-30"
    state = newest / "state.safetensors"
    whole = state.read_bytes()
    if damage == "flip":
        state.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    elif damage == "truncate":
        state.write_bytes(whole[:-100])
    elif damage == "no state":
        state.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "bad manifest":
        (newest / "manifest.json").write_text("[]")
    else:
        newest.rename(run.path / "checkpoint-31")
    with pytest.raises(UserError, match=r"is damaged; continue .* --resume .*checkpoint-20") as caught:
        loaded(RunFolder.resume(run.path, Config()))
    assert "\n" not in str(caught.value)
    assert loaded(RunFolder.resume(run.path, Config(), Checkpoint.at(run.path / "checkpoint-20")))


def test_metrics_are_valid_json_whatever_happens(run: RunFolder) -> None:
    run.metrics.append([{"step": 1, "loss": float("nan"), "norm": float("inf")}])
    assert json.loads(run.metrics.path.read_text()) == {"step": 1, "loss": None, "norm": None}


def test_what_out_and_resume_mean_together(run: RunFolder, tmp_path: Path) -> None:
    at_20 = run.path / "checkpoint-20"
    assert RunPlace.asked_for(run.path, None) == RunPlace(run.path)
    assert RunPlace.asked_for(run.path, "latest") == RunPlace(run.path, resuming=True)
    assert RunPlace.asked_for(None, str(run.path)) == RunPlace(run.path, resuming=True)
    assert RunPlace.asked_for(run.path, str(at_20)) == RunPlace(run.path, True, Checkpoint(20, at_20))
    for out, resume, said in (
        (None, None, "--out"),
        (None, "latest", "--out"),
        (None, str(tmp_path / "absent"), "no run to resume"),
        (tmp_path / "other", str(run.path), "omit --out"),
    ):
        with pytest.raises(UserError, match=said):
            RunPlace.asked_for(out, resume)
    with pytest.raises(UserError, match="no run to resume"):
        _ = RunPlace(tmp_path / "absent", resuming=True).stored_config


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", Config())
    run.model.mkdir()
    with pytest.raises(UserError, match="has finished"):
        RunFolder.resume(run.path, Config())


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder.resume(tmp_path, Config())


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "NaN",
        '{"step": 30}',
        '{"sha256": {}}',
        '{"step": 30, "sha256": []}',
        '{"step": 30, "sha256": {}}',
        '{"step": "30", "sha256": {"state.safetensors": "%s"}}' % ("0" * 64),
        '{"step": 30.0, "sha256": {"state.safetensors": "%s"}}' % ("0" * 64),
        '{"step": 30, "sha256": {"state.safetensors": 5}}',
        '{"step": 30, "sha256": {"../../secret": "%s"}}' % ("0" * 64),
        '{"step": 30, "sha256": {"/dev/zero": "%s"}}' % ("0" * 64),
    ],
)
def test_a_manifest_of_another_form(run: RunFolder, manifest: str) -> None:
    (run.path / "checkpoint-30" / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"checkpoint-30 is damaged; continue .* --resume .*checkpoint-20"):
        loaded(RunFolder.resume(run.path, Config()))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_pipe_in_a_checkpoint(run: RunFolder, name: str) -> None:
    (run.path / "checkpoint-30" / name).unlink()
    os.mkfifo(run.path / "checkpoint-30" / name)
    with pytest.raises(UserError, match="checkpoint-30 is damaged"):
        loaded(RunFolder.resume(run.path, Config()))
