"""Prompts become a captioned folder, once, and an interrupted one goes on without changing an image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.data.image_folder import CaptionedImage
from erasediff.data.prompt_images import read_prompts, synthesise
from erasediff.errors import UserError

QUIET = Console(quiet=True)
PROMPTS = ["a shoe", "a bag", "a coat"]


class Sampler:
    """Paints noise that depends on the seed, the image's number and its prompt."""

    hash = "encoders"

    def __init__(self, weights: str = "first", fail_after: int = 10**9) -> None:
        self.weights = weights
        self.fail_after = fail_after
        self.painted = 0

    def denoiser_hash(self) -> str:
        return self.weights

    def sample(self, prompts: list[str], *, seed: int, progress, **settings: object) -> Tensor:
        images = []
        for number, prompt in enumerate(prompts):
            if self.painted >= self.fail_after:
                raise KeyboardInterrupt
            self.painted += 1
            random = np.random.default_rng([seed, number, *prompt.encode()])
            images.append(torch.from_numpy(random.integers(0, 256, (8, 8, 3), np.uint8)))
            progress(1)
        return torch.stack(images)


def made(painter: Sampler, cache: Path, **settings: int) -> list[CaptionedImage]:
    return synthesise(painter, PROMPTS, cache, QUIET, count=15, **settings)


def test_it_is_an_ordinary_captioned_folder(tmp_path: Path) -> None:
    images = made(Sampler(), tmp_path)
    assert [image.caption for image in images] == [prompt for prompt in PROMPTS for _ in range(15)]
    assert len({image.read() for image in images}) == 45
    assert np.asarray(Image.open(images[0].path)).shape == (8, 8, 3)


def test_it_is_made_once(tmp_path: Path) -> None:
    first, again = made(Sampler(), tmp_path), Sampler()
    assert made(again, tmp_path) == first
    assert again.painted == 0


def test_an_interrupted_one_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    stopped = Sampler(fail_after=20)
    with pytest.raises(KeyboardInterrupt):
        made(stopped, tmp_path / "a")
    resumed = Sampler()
    images = made(resumed, tmp_path / "a")
    assert resumed.painted == 45 - 16
    assert [i.read() for i in images] == [i.read() for i in made(Sampler(), tmp_path / "b")]


@pytest.mark.parametrize(("weights", "settings"), [("second", {}), ("first", {"seed": 1}), ("first", {"height": 16})])
def test_another_model_seed_or_size_is_another_folder(tmp_path: Path, weights: str, settings: dict[str, int]) -> None:
    first = made(Sampler(), tmp_path)
    assert made(Sampler(weights), tmp_path, **settings)[0].path.parent != first[0].path.parent


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# things to keep\n\na bag\n  a coat \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a bag", "a coat"]
    (tmp_path / "prompts.txt").write_text("#\n")
    with pytest.raises(UserError, match="There are no prompts in"):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="Cannot read the prompts in"):
        read_prompts(tmp_path / "none.txt")


def test_nothing_to_make(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is nothing to synthesise"):
        synthesise(Sampler(), [], tmp_path, QUIET, count=1)
