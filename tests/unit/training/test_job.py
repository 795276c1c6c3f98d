"""Jobs leave the process as they found it, and mistaken devices are one sentence."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from erasediff.config import load_config
from erasediff.errors import UserError
from erasediff.models import PixelModel
from erasediff.training.job import set_up_device
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.sample import sample


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_library_call_restores_threads_and_random_state(tmp_path: Path) -> None:
    settings = {"device": "cpu", "threads": 1, "unlearn.forget": [3], "unlearn.steps": 1, "unlearn.batch_size": 4}
    config, console = load_config(None, settings), Console(quiet=True)
    model = PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1)
    random = torch.get_rng_state()
    job = build_unlearning_job(config, model)
    assert torch.get_num_threads() == 3
    list(job.trial_steps(1))
    job.run(RunPlace(tmp_path / "run"), console)
    sample(config, tmp_path / "run/model", tmp_path / "grid.png", console, classes=[3], count=1)
    assert torch.get_num_threads() == 3
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.usefixtures("three_threads")
def test_threads_are_restored_after_a_mistake() -> None:
    with pytest.raises(UserError):
        build_unlearning_job(load_config(None, {"device": "cpu", "unlearn.forget": [3]}))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("device", ["meta", "xpu", "mps", "cuda:99", "banana"])
def test_a_device_that_cannot_run_is_one_sentence(device: str, one_thread: None) -> None:
    with pytest.raises(UserError, match=f'device "{device}"') as caught:
        set_up_device(load_config(None, {"device": device}))
    assert "\n" not in str(caught.value)


def test_a_run_of_the_digits_lists_its_images(tmp_path: Path, one_thread: None) -> None:
    settings = {"device": "cpu", "unlearn.forget": [3], "unlearn.steps": 1, "unlearn.batch_size": 4}
    model = PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1)
    console = Console(file=io.StringIO(), width=40)
    build_unlearning_job(load_config(None, settings), model).run(RunPlace(tmp_path / "run"), console)
    forgotten, retained = (
        [json.loads(line) for line in (tmp_path / f"run/{name}.jsonl").read_text().splitlines()]
        for name in ("forget", "retain")
    )
    said = f"Request: forgetting {len(forgotten)} of {len(forgotten) + len(retained):,} images (by class: "
    assert any(line.startswith(said) for line in console.file.getvalue().splitlines())
    assert {entry["class"] for entry in forgotten} == {"3"}
    assert len({entry["sha256"] for entry in forgotten + retained}) == len(
        {entry["image"] for entry in forgotten + retained}
    )
