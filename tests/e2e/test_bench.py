"""``erasediff bench``: the flags of unlearn, numbers that add up, and a plot that comes from the file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Ended

from erasediff.models import PixelModel
from erasediff.report.figures import draw
from erasediff.utils.timing import Stopwatch, TransientPeak, matmul_flops_per_second

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in an empty folder of its own; its cache is there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1).save(tmp_path / "digits")
    return tmp_path / "digits"


def test_numbers_add_up_and_the_weights_on_disk_stay(digits: Path, run: Run, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    command = ("bench", "--model", digits, "--forget", 3, "--batch-size", 4, "--turns", 3, "--json")
    code, printed, _ = run(*command, "--out", tmp_path / "results.jsonl", "--plot", tmp_path / "bench.svg")
    assert code == 0
    result = json.loads(printed)
    ours, plain = result["contenders"]
    assert (ours["name"], plain["name"]) == ("erasediff", "fine-tuning")
    assert ours["samples"] == plain["samples"] == 8
    for contender in result["contenders"]:
        assert contender["first_quartile"] <= contender["seconds"] <= contender["third_quartile"]
        assert contender["samples_per_second"] == pytest.approx(8 / contender["seconds"])
        used = contender["flops"] / contender["seconds"] / result["matmul_flops_per_second"]
        assert contender["flops_utilisation"] == pytest.approx(used)
    # By default both targets are a frozen teacher's: its forward pass over all of the samples.
    assert 1.3 < ours["flops"] / plain["flops"] < 1.4
    assert 0 < ours["update_share"] < 1
    assert plain["update_share"] is None
    assert plain["times_fine_tuning"] == 1
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [ours["seconds"], plain["seconds"]]
    drawn = (tmp_path / "bench.svg").read_bytes()
    assert drawn.count(b"samples/s") == 2
    draw(tmp_path / "results.jsonl", tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").read_bytes() == drawn
    draw(tmp_path / "results.jsonl", tmp_path / "bench.pdf")
    assert b"CreationDate" not in (tmp_path / "bench.pdf").read_bytes()
    assert before == {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}


def test_noise_targets_cost_the_flops_of_fine_tuning(digits: Path, run: Run) -> None:
    command = ("bench", "--model", digits, "--forget", 3, "--batch-size", 4, "--turns", 2, "--target", "uniform")
    command += ("--set", "unlearn.retain_target=true")
    _, printed, _ = run(*command, "--json")
    ours, plain = json.loads(printed)["contenders"]
    assert ours["flops"] == plain["flops"]
    code, printed, _ = run(*command)
    assert code == 0
    assert "fine-tuning" in printed


def test_a_text_to_image_model_is_measured_on_noise(nano_folder: Any, run: Run, tmp_path: Path) -> None:
    (tmp_path / "nano.yaml").write_text("threads: 1\nimages: {height: 32, width: 32, bucket_step: null}\n")
    prompts = ("--forget-prompts", "a cat", "--retain-prompts", "a dog", "--train", "lora", "--config", "nano.yaml")
    code, printed, errors = run("bench", "--model", nano_folder("sd"), *prompts, "--turns", 2, "--json")
    assert code == 0, errors
    result = json.loads(printed)
    assert result["parameters_trained"] < result["parameters"] / 2
    assert result["contenders"][0]["samples"] == 8


def test_mistakes_are_told(digits: Path, run: Run, tmp_path: Path) -> None:
    common = ("bench", "--model", digits, "--forget", 3)
    code, _, errors = run(*common, "--method", "finetune", "--turns", 2)
    assert (code, "erasediff" in errors) == (2, True)
    code, _, errors = run(*common, "--plot", "plot.svg")
    assert (code, "--out" in errors) == (2, True)
    code, _, errors = run("bench", "--forget", 3)
    assert (code, "--model" in errors) == (2, True)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(Exception, match=r"\.svg"):
        draw(tmp_path / "results.jsonl", tmp_path / "plot.bmp")


def test_the_stopwatch_tells_each_calls_time() -> None:
    watch = Stopwatch(torch.device("cpu"))
    nap = watch.timed(time.sleep)
    nap(0.02)
    nap(0.05)
    first, second = watch.seconds()
    assert 0.02 <= first < second
    assert second >= 0.05


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_the_transient_peak_is_what_came_and_went() -> None:
    megabyte = 2**20
    with TransientPeak(torch.device("cpu")) as peak:
        torch.ones(64 * megabyte, dtype=torch.uint8)
    assert peak.bytes is not None
    assert 60 * megabyte < peak.bytes < 80 * megabyte


def test_a_matrix_product_has_a_rate() -> None:
    assert matmul_flops_per_second(torch.device("cpu"), torch.float32) > 1e8
