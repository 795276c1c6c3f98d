"""A rank that dies, at whatever point: the run ends with one sentence, and its last complete checkpoint goes on."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import SECONDS, TINY, curve, ranks_of, run, start, weights
from diffusers import DDPMPipeline, UNet2DModel

from erasediff.parallel.control_plane import ControlPlane
from erasediff.training.checkpoint import Checkpoint


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_of_a_rank_at_random_points_loses_nothing(base: Path, tmp_path: Path, kills: int) -> None:
    steps = 10 * kills
    (tmp_path / "tiny.yaml").write_text(TINY.replace("checkpoint_every: 4", "checkpoint_every: 2"))
    begin = ("unlearn", "--model", base, "--config", tmp_path / "tiny.yaml", "--steps", steps)
    begin = (*begin, "--launch", "fsdp", "--processes", 2)
    run(*begin, "--out", tmp_path / "whole")

    out, reached = tmp_path / "killed", 0
    for number in range(kills):
        process = start(*begin, "--out", out, *(("--resume", "latest") if number else ()))
        # Lines from before the kill may be there still: then this one comes while the ranks start.
        wait_for_step(out, reached + random.randint(1, 6))
        while len(ranks := ranks_of(process)) < 2:
            time.sleep(0.05)
        time.sleep(random.random() * 0.2)
        rank = random.randrange(2)
        os.kill(ranks[rank], signal.SIGKILL)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 2, errors
        assert f"Rank {rank} was killed (SIGKILL); --resume latest continues" in errors
        assert "Traceback" not in errors
        newest = Checkpoint.of_run(out)
        for checkpoint in newest:
            with checkpoint.fragments(ControlPlane()):
                pass
        reached = newest[-1].step if newest else 0
    run("unlearn", "--resume", "latest", "--out", out)

    assert curve(out) == curve(tmp_path / "whole")
    assert all(torch.equal(weight, weights(out)[name]) for name, weight in weights(tmp_path / "whole").items())
    assert not list(out.glob(".*partial"))
    assert type(DDPMPipeline.from_pretrained(out / "model").unet) is UNet2DModel, "no class of FSDP's is saved"
