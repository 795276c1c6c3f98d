"""The cache holds what the encoders say, computes nothing twice, and its batches do not depend on how it came about."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from erasediff.data.batches import CachedBatches
from erasediff.data.cached_images import CachedImages
from erasediff.data.forget_split import check_disjoint
from erasediff.data.image_folder import CaptionedImage, read_captioned_images
from erasediff.data.latent_cache import LatentCache
from erasediff.data.preprocessing import Buckets, open_picture, to_pixels
from erasediff.data.tensor_store import ShardStore
from erasediff.errors import UserError

BUCKETS = Buckets.around(32, 32, step=8)
QUIET = Console(quiet=True)


class CountingEncoders:
    """Encodes an image by averaging pixels, a caption by its length; counts what it was asked."""

    def __init__(self, weights: str = "first") -> None:
        self.hash = weights
        self.images = 0
        self.captions: list[str] = []
        self.fail_after = 10**9

    def encode_images(self, pixels: Tensor) -> Tensor:
        if self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 4)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self.captions += prompts
        return {"encoder_hidden_states": torch.tensor([[[float(len(prompt))]] for prompt in prompts])}

    def size_condition(
        self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int], count: int
    ) -> dict[str, Tensor]:
        return {"time_ids": torch.tensor([[*original_size, *crop, *target_size]] * count)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve noisy images of three shapes; image i's caption has i + 1 letters."""
    random = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (height, width) in enumerate([(32, 32), (40, 80), (64, 32)] * 4):
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("x" * (i + 1))
    return folder


@pytest.fixture
def images(folder: Path) -> list[CaptionedImage]:
    return read_captioned_images(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Callable[[], LatentCache]:
    """The cache as a new process finds it."""
    return lambda: LatentCache(tmp_path / "cache")


@pytest.fixture
def cached(images: list[CaptionedImage], cache: Callable[[], LatentCache]) -> CachedImages:
    return cache().fill(images, CountingEncoders(), BUCKETS, QUIET, mirror=True, batch_size=3)


def numbers_in(batch: dict[str, Tensor]) -> list[int]:
    """Images of ``folder`` in a batch, by the lengths of their captions."""
    return [int(length) - 1 for length in batch["encoder_hidden_states"].flatten()]


class TestNotFinite:
    """Latents and embeddings that are NaN or infinite are refused by name, and never kept."""

    def test_an_image_is_named(self, images: list[CaptionedImage], cache: Callable[[], LatentCache]) -> None:
        class Broken(CountingEncoders):
            def encode_images(self, pixels: Tensor) -> Tensor:
                latents = super().encode_images(pixels)
                latents[int(self.images >= 9) :, 0, 0, 0] *= float("inf") if self.images >= 9 else 1.0
                return latents

        with pytest.raises(UserError, match=r"The latents of the image .*\d\d\.png hold NaN or infinity: the VAE"):
            cache().fill(images, Broken(), BUCKETS, QUIET, batch_size=3)
        assert 0 < len(cache().latents) < 12

    def test_a_prompt_is_named(self, images: list[CaptionedImage], cache: Callable[[], LatentCache]) -> None:
        class Broken(CountingEncoders):
            def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
                values = super().encode_prompts(prompts)["encoder_hidden_states"]
                return {"encoder_hidden_states": values.where(values != 5, float("nan"))}

        with pytest.raises(UserError, match="The embeddings of the prompt 'xxxxx' hold NaN or infinity"):
            cache().fill(images, Broken(), BUCKETS, QUIET)

    def test_what_an_older_version_has_kept_is_named_when_it_is_read(
        self, images: list[CaptionedImage], cache: Callable[[], LatentCache], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoders = CountingEncoders()
        with monkeypatch.context() as patch:
            patch.setattr("erasediff.data.latent_cache.check_latents", lambda latents, images: None)
            patch.setattr(encoders, "encode_images", lambda pixels: torch.full((len(pixels), 3, 8, 8), float("nan")))
            cached = cache().fill(images, encoders, BUCKETS, QUIET)
        with pytest.raises(UserError, match=r"The latents of the image .*00\.png hold NaN"):
            cached.row(cached.entries[0])

    def test_a_row_is_checked_once(self, cached: CachedImages, monkeypatch: pytest.MonkeyPatch) -> None:
        checked = []
        monkeypatch.setattr("erasediff.data.cached_images.check_latents", lambda *args: checked.append(args))
        monkeypatch.setattr("erasediff.data.cached_images.check_embeddings", lambda *args: checked.append(args))
        for flipped in (False, True, False):
            cached.row(cached.entries[0], flipped=flipped)
        assert [set(tensors) for tensors, _ in checked] == [{"latent", "mirrored"}, {"encoder_hidden_states"}]

    def test_a_disk_without_room_is_told_with_the_first_row(
        self, images: list[CaptionedImage], cache: Callable[[], LatentCache], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=51))
        with pytest.raises(UserError, match="13 encoded images or captions need about"):
            cache().fill(images, CountingEncoders(), BUCKETS, QUIET)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
        assert len(cache().fill(images, CountingEncoders(), BUCKETS, QUIET)) == 12


class TestCache:
    def test_it_holds_what_the_encoders_say(self, images: list[CaptionedImage], cached: CachedImages) -> None:
        assert len(cached) == 12
        for image, entry in zip(images, cached.entries, strict=True):
            pixels = to_pixels(open_picture(image.read(), "x"))
            row = cached.latents.row(entry.latent)
            if pixels.shape[1:] == (32, 32):
                expected = CountingEncoders().encode_images(pixels[None])[0]
                torch.testing.assert_close(row["latent"], expected)
                torch.testing.assert_close(row["mirrored"], expected.flip(-1))
            assert row["time_ids"][:2].tolist() == list(pixels.shape[1:])
            assert row["time_ids"][4:].tolist() == list(entry.size) == [4 * n for n in row["latent"].shape[1:]]

    def test_nothing_is_computed_twice(self, images: list[CaptionedImage], cache, cached: CachedImages) -> None:
        again = CountingEncoders()
        assert cache().fill(images, again, BUCKETS, QUIET, mirror=True).entries == cached.entries
        assert (again.images, again.captions) == (0, [])

    def test_copies_and_equal_captions_are_computed_once(self, folder: Path, cache) -> None:
        (folder / "copy.png").write_bytes((folder / "00.png").read_bytes())
        (folder / "copy.txt").write_text("x")
        encoders = CountingEncoders()
        cached = cache().fill(read_captioned_images(folder), encoders, BUCKETS, QUIET)
        assert (encoders.images, sorted(encoders.captions, key=len)) == (12, ["x" * n for n in range(13)])
        assert len(cached) == 13
        assert cached.entries[0] == cached.entries[12]

    def test_only_what_changed_is_computed_again(self, folder: Path, cache, cached: CachedImages) -> None:
        Image.new("RGB", (32, 32)).save(folder / "00.png")
        (folder / "05.txt").write_text("another")
        (folder / "07.png").rename(folder / "99.png")
        (folder / "07.txt").rename(folder / "99.txt")
        again = CountingEncoders()
        cache().fill(read_captioned_images(folder), again, BUCKETS, QUIET, mirror=True)
        assert (again.images, again.captions) == (2, ["another"])

    def test_other_weights_are_other_latents(self, images: list[CaptionedImage], cache, cached: CachedImages) -> None:
        other = CountingEncoders("second")
        cache().fill(images, other, BUCKETS, QUIET)
        assert (other.images, len(other.captions)) == (12, 13)

    def test_an_interrupted_run_resumes(self, images: list[CaptionedImage], cache, monkeypatch) -> None:
        monkeypatch.setattr("erasediff.data.tensor_store.SHARD_SECONDS", 0.0)
        stopped = CountingEncoders()
        stopped.fail_after = 6
        with pytest.raises(KeyboardInterrupt):
            cache().fill(images, stopped, BUCKETS, QUIET, batch_size=2)
        again = CountingEncoders()
        resumed = cache().fill(images, again, BUCKETS, QUIET, batch_size=2)
        assert (stopped.images, again.images, again.captions) == (6, 6, [])
        assert len(resumed) == 12

    def test_a_file_that_changes_while_it_is_read_is_refused(self, images, cache, monkeypatch) -> None:
        from erasediff.data import latent_cache as latents

        def changed(*arguments):
            found = survey(*arguments)
            Image.new("RGB", (32, 32)).save(images[0].path)
            return found

        survey = latents.survey
        monkeypatch.setattr(latents, "survey", changed)
        with pytest.raises(UserError, match=r"00\.png changed while it was being read"):
            cache().fill(images, CountingEncoders(), BUCKETS, QUIET)

    def test_copies_in_both_sets_are_found(self, images: list[CaptionedImage], cache, cached: CachedImages) -> None:
        forget = cache().fill(images[:2], CountingEncoders(), BUCKETS, QUIET)
        with pytest.raises(UserError, match="share 2 of 2"):
            check_disjoint(forget.ids, cached.ids)
        check_disjoint(forget.ids, cached.ids[2:])

    def test_a_damaged_shard_is_named(self, cache, cached: CachedImages) -> None:
        shard = next(cached.latents.folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(UserError, match=f"{shard.name} is damaged: delete it"):
            cache()

    def test_nothing_to_cache(self, cache) -> None:
        with pytest.raises(UserError, match="No image is left"):
            cache().fill([], CountingEncoders(), BUCKETS, QUIET)


class TestBrokenImages:
    @pytest.fixture(params=["empty", "garbage", "half"])
    def broken(self, folder: Path, request: pytest.FixtureRequest) -> Path:
        whole = (folder / "04.png").read_bytes()
        content = {"empty": b"", "garbage": b"no image at all", "half": whole[: len(whole) // 2]}[request.param]
        (folder / "04.png").write_bytes(content)
        return folder / "04.png"

    def test_one_is_refused_by_name(self, folder: Path, broken: Path, cache) -> None:
        with pytest.raises(UserError, match=r"04\.png is (empty|broken).* or give --skip-broken\.$"):
            cache().fill(read_captioned_images(folder), CountingEncoders(), BUCKETS, QUIET)

    def test_one_is_skipped_by_name_if_asked(self, folder: Path, broken: Path, cache) -> None:
        console = Console(record=True, width=500, file=open("/dev/null", "w"))  # noqa: SIM115
        cached = cache().fill(read_captioned_images(folder), CountingEncoders(), BUCKETS, console, skip_broken=True)
        assert len(cached) == 11
        assert "Skipped: The image " in console.export_text()
        assert 4 not in {n for step in range(60) for n in numbers_in(CachedBatches(cached, 4, seed=0).at(step))}


class TestBatches:
    def test_samples_and_conditions_go_together(self, cached: CachedImages) -> None:
        batches = CachedBatches(cached, 6, seed=1)
        for step in range(12):
            batch = batches.at(step)
            assert batch["sample_ids"].tolist() == list(range(6))
            assert (batch["time_ids"][0] == batch["time_ids"]).all()
            for number, sample in zip(numbers_in(batch), batch["sample"], strict=True):
                row = cached.latents.row(cached.entries[number].latent)
                assert any(torch.equal(sample, row[name]) for name in ("latent", "mirrored"))

    def test_half_are_flipped_and_none_without_mirror_images(self, images, cache, cached: CachedImages) -> None:
        plain = cache().fill(images, CountingEncoders(), BUCKETS, QUIET)
        for source, expected in ((cached, 0.5), (plain, 0.0)):
            batches = CachedBatches(source, 50, seed=0)
            flips = []
            for step in range(24):
                batch = batches.at(step)
                own = [source.latents.row(source.entries[number].latent)["latent"] for number in numbers_in(batch)]
                flips += [not torch.equal(a, b) for a, b in zip(batch["sample"], own, strict=True)]
            assert abs(sum(flips) / len(flips) - expected) < 0.07

    def test_captions_are_dropped_at_the_asked_rate(self, cached: CachedImages) -> None:
        batches = CachedBatches(cached, 100, seed=0, caption_dropout=0.1)
        lengths = torch.cat([batches.at(step)["encoder_hidden_states"].flatten() for step in range(12)])
        assert abs((lengths == 0).double().mean() - 0.1) < 0.03

    def test_a_step_needs_none_before_it_and_a_cache_built_otherwise_gives_the_same(
        self, images, cached: CachedImages, tmp_path: Path
    ) -> None:
        other = LatentCache(tmp_path / "elsewhere")
        other.fill(images[7:], CountingEncoders(), BUCKETS, QUIET, mirror=True, batch_size=1)
        rebuilt = other.fill(images, CountingEncoders(), BUCKETS, QUIET, mirror=True, batch_size=5)
        ran, fresh = (CachedBatches(source, 5, seed=9, caption_dropout=0.2) for source in (cached, rebuilt))
        for step in range(30):
            reached = ran.at(step)
        assert all(torch.equal(reached[name], value) for name, value in fresh.at(29).items())

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_ranks_cut_the_same_batch(self, cached: CachedImages, world_size: int) -> None:
        def batches(rank: int, world_size: int) -> CachedBatches:
            return CachedBatches(cached, 8, seed=1, caption_dropout=0.3, rank=rank, world_size=world_size)

        for step in (0, 5, 13):
            parts = [batches(rank, world_size).at(step) for rank in range(world_size)]
            for name, whole in batches(0, 1).at(step).items():
                assert torch.equal(torch.cat([part[name] for part in parts]), whole)

    def test_the_dtype_is_as_asked(self, cached: CachedImages) -> None:
        batch = CachedBatches(cached, 2, seed=0, dtype=torch.bfloat16).at(0)
        assert (batch["sample"].dtype, batch["encoder_hidden_states"].dtype) == (torch.bfloat16, torch.bfloat16)
        assert batch["time_ids"].dtype == torch.int64

    @pytest.mark.parametrize(
        "arguments", [{"batch_size": 0}, {"batch_size": 3, "world_size": 2}, {"batch_size": 2, "caption_dropout": 1.5}]
    )
    def test_impossible_arguments(self, cached: CachedImages, arguments) -> None:
        with pytest.raises(ValueError, match=r"batch|caption_dropout"):
            CachedBatches(cached, seed=0, **arguments)


class TestShards:
    def test_rows_of_several_shapes_and_dtypes(self, tmp_path: Path) -> None:
        rows = {
            "a": {"x": torch.randn(2, 3).bfloat16(), "n": torch.tensor(7)},
            "b": {"x": torch.randn(2, 3).bfloat16(), "n": torch.tensor(8)},
            "c": {"y": torch.randn(0, 5)},
        }
        with ShardStore(tmp_path).writing() as writer:
            for key, row in rows.items():
                writer.add(key, row)
        store = ShardStore(tmp_path)
        assert len(store) == 3
        for key, row in rows.items():
            assert key in store
            read = store.row(key)
            assert read.keys() == row.keys()
            assert all(torch.equal(read[name], row[name]) and read[name].dtype == row[name].dtype for name in row)
        with pytest.raises(KeyError):
            store.row("d")
        assert len(list(tmp_path.iterdir())) == 2
