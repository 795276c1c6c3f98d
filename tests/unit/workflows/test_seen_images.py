"""A run reads and encodes the images that its steps see, in the order of the whole set, and tells which they are."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.config import Config, load_config
from erasediff.data import from_torch_dataset
from erasediff.data.image_lists import ImageLists, ListedImage
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.models import PixelModel
from erasediff.training.job import TrainingJob
from erasediff.training.run_dir import RunPlace
from erasediff.workflows.anchor_selection import anchor_candidates
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff.workflows.latent_data import listed_images
from erasediff.workflows.seen_images import batches_seen

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "unlearn.forget": ["bee"],
    "unlearn.steps": 2,
    "unlearn.batch_size": 3,
    "run.checkpoint_every": 1,
    "run.keep_checkpoints": 2,
}
QUIET = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("one_thread", "cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))


class Counted:
    """45 images of three classes, and which of them were read."""

    targets = tuple(number % 3 for number in range(45))
    classes = ("ant", "bee", "cow")

    def __init__(self) -> None:
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        self.read.add(number)
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8), self.targets[number]


def job_of(data: Counted, **settings: Any) -> TrainingJob:
    model = PixelModel.build(num_classes=3, image_shape=(3, 8, 8), block_out_channels=(8, 8))
    return build_unlearning_job(load_config(None, SETTINGS | settings), model, data=from_torch_dataset(data))


def listed(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def test_only_what_the_steps_see_is_read_and_batches_are_those_of_the_whole_set(tmp_path: Path) -> None:
    data, whole = Counted(), Counted()
    job, complete = job_of(data), job_of(whole, **{"images.cache": "all"})
    assert (len(data.read), len(whole.read)) == (2 * 2 * 3, 45)
    assert job.forget is not None
    assert complete.forget is not None
    for step in range(2):
        for ours, theirs in ((job.retain, complete.retain), (job.forget, complete.forget)):
            batch = theirs.at(step)
            assert all(torch.equal(value, batch[name]) for name, value in ours.at(step).items())

    console = Console(file=io.StringIO(), width=40)
    job.run(RunPlace(tmp_path / "out"), console)
    told = console.file.getvalue()
    assert "forgetting 15 of 45 images (by class: 15), retaining 30, of which the run sees 6.\n" in told
    assert "in 2 steps of 3 the run never sees 9 of the 15 images to forget; --steps 5 shows each of them once." in told
    lists = {name: listed(tmp_path / "out", name) for name in ("forget", "retain")}
    seen = [record["image"] for records in lists.values() for record in records if record["sha256"] is not None]
    assert {int(name.rpartition("/")[2]) for name in seen} == data.read
    assert [len(records) for records in lists.values()] == [15, 30]

    # A resumed run needs the same images, and finds them.
    (tmp_path / "out/model").rename(tmp_path / "first")
    again = job_of(Counted())
    again.run(RunPlace(tmp_path / "out", resuming=True), QUIET)
    assert {name: listed(tmp_path / "out", name) for name in lists} == lists


def test_a_run_that_sees_every_image_says_no_more() -> None:
    job = job_of(Counted(), **{"unlearn.steps": 10})
    assert job.lists is not None
    assert job.lists.summary().endswith("retaining 30.")
    assert job.lists.warning is None
    assert all(image.sha256 for image in (*job.lists.forget, *job.lists.retain))


def test_a_broken_image_that_no_step_sees_stops_no_run() -> None:
    class Broken(Counted):
        def __getitem__(self, number: int) -> tuple[Tensor, int]:
            if number == unseen:
                raise UserError("This image is broken.")
            return super().__getitem__(number)

    data = Counted()
    job_of(data)
    unseen = min(set(range(45)) - data.read)
    job_of(Broken())
    with pytest.raises(UserError, match="broken"):
        job_of(Broken(), **{"images.cache": "all"})


def config_of(method: str, **settings: Any) -> Config:
    return load_config(None, {"unlearn.method": method, "unlearn.steps": 2} | settings)


def test_batches_outside_of_the_steps_count() -> None:
    assert batches_seen(config_of("erasediff")) == 2
    assert batches_seen(config_of("erasediff", **{"text_to_image.saliency": 0.5})) == 8
    assert batches_seen(config_of("salun", **{"salun.batches": 5})) == 5
    assert batches_seen(config_of("selective-amnesia")) == 50
    pruning = config_of("pruning", **{"pruning.objective": "erasediff", "pruning.observations": 3})
    assert METHOD_SPECS["pruning"].needs(pruning).batches == 8


def test_an_anchor_may_be_a_caption_that_the_run_does_not_see() -> None:
    def images(*captions: str) -> tuple[ListedImage, ...]:
        return tuple(ListedImage(f"{caption}.png", None, ("caption", caption)) for caption in captions)

    lists = ImageLists(images("a cat"), images("a dog", "a cat", "a dog", "a bird"))
    assert anchor_candidates(lists) == ["a dog", "a bird"]


def test_a_file_in_both_sets_is_found_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data/cat/0.png", "data/dog/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "data/cat")
    monkeypatch.chdir(tmp_path)
    settings = {"images.data": "data", "images.forget_data": str(tmp_path / "link")}
    config = load_config(None, settings)
    with pytest.raises(UserError, match=r"share 1 of 1 forgotten images: .*link/0\.png is also data/cat/0\.png"):
        listed_images(config.images, captions=False)
