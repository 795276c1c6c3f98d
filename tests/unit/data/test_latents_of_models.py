"""Latent batches of every family: from prompts and a folder to unlearning steps, through the cache."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nano import FAMILY_EXAMPLES
from PIL import Image
from rich.console import Console

from erasediff import EraseDiff
from erasediff.data import Buckets, CachedBatches, LatentCache, Stream, read_images, synthesise
from erasediff.models.load import load_text_to_image
from erasediff_kernels import ConstrainedAdamW

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Console(quiet=True)
SIZE = 32


@pytest.fixture
def forget_folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    folder = tmp_path / "forget"
    folder.mkdir()
    for i, shape in enumerate([(40, 40, 3), (30, 90, 3), (50, 41, 3)]):
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a dog\n1.png,a dog lying\n2.png,a dog\n")
    return folder


@pytest.mark.parametrize("name", FAMILY_EXAMPLES)
def test_unlearning_from_the_cache(
    name: str, nano_folder: Callable[[str], Path], forget_folder: Path, tmp_path: Path
) -> None:
    model = load_text_to_image(nano_folder(name))
    made = synthesise(
        model, ["a cat", "a hat"], tmp_path, QUIET, count=2, num_inference_steps=2, height=SIZE, width=SIZE
    )
    cache = LatentCache(tmp_path / "cache")
    buckets = Buckets.around(SIZE, SIZE, step=8)
    retain = cache.fill(made, model, Buckets.only(SIZE, SIZE), QUIET)
    forget = cache.fill(read_images(str(forget_folder)), model, buckets, QUIET, mirror=True)
    assert len({entry.size for entry in forget.entries}) == 2

    model.release_encoders()
    model.encode_images = model.encode_prompts = lambda *arguments: pytest.fail("the encoders had left")
    assert cache.fill(made, model, Buckets.only(SIZE, SIZE), QUIET).entries == retain.entries

    optimizer = ConstrainedAdamW(model.denoiser.parameters(), lr=1e-4)
    unlearner = EraseDiff(model.denoiser, optimizer, process=model.process, denoiser=model.predict)
    batches = {
        Stream.RETAIN: CachedBatches(retain, 4, seed=0, caption_dropout=0.5),
        Stream.FORGET: CachedBatches(forget, 4, seed=0, stream=Stream.FORGET),
    }
    shapes = set()
    for step in range(4):
        forgotten = batches[Stream.FORGET].at(step)
        shapes.add(forgotten["sample"].shape)
        assert unlearner.step(batches[Stream.RETAIN].at(step), forgotten).finite
    assert len(shapes) == 2


def test_sdxl_is_told_how_each_image_was_cut(nano_folder: Callable[[str], Path], forget_folder: Path) -> None:
    model = load_text_to_image(nano_folder("sdxl"))
    images = read_images(str(forget_folder))
    cached = LatentCache(forget_folder.parent / "cache").fill(images, model, Buckets.only(SIZE, SIZE), QUIET)
    wide = cached.latents.row(cached.entries[1].latent)
    crop = (round(90 * SIZE / 30) - SIZE) // 2
    assert wide["time_ids"].tolist() == [30, 90, 0, crop, SIZE, SIZE]
