"""Sizes of about one area for images of every shape, and batches of one size each, addressed by step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from erasediff.data.batch_order import BucketOrder, Stream
from erasediff.data.preprocessing import Buckets, Fit, fitted
from erasediff.errors import UserError

SDXL_WIDTHS = {  # Podell et al. 2023, appendix I, the portrait half and the square
    512: [2048, 1984, 1920, 1856],
    576: [1792, 1728, 1664],
    640: [1600, 1536],
    704: [1472, 1408, 1344],
    768: [1344, 1280],
    832: [1216, 1152],
    896: [1152, 1088],
    960: [1088, 1024],
    1024: [1024],
}


def test_around_a_megapixel_they_are_those_of_sdxl() -> None:
    landscape = {(height, width) for height, widths in SDXL_WIDTHS.items() for width in widths}
    assert set(Buckets.around(1024, 1024).sizes) == landscape | {(width, height) for height, width in landscape}


def test_the_size_itself_is_always_there() -> None:
    assert (40, 40) in Buckets.around(40, 40, step=16).sizes
    assert Buckets.only(32, 48).sizes == ((32, 48),)
    with pytest.raises(UserError, match="smaller than the bucket step 64"):
        Buckets.around(32, 32)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_a_fit_covers_its_bucket_and_cuts_one_side_only(height: int, width: int) -> None:
    fit = Buckets.around(512, 512).fit(height, width)
    assert 0 <= fit.top <= fit.scaled.height - fit.size.height
    assert 0 <= fit.left <= fit.scaled.width - fit.size.width
    assert fit.scaled.height == fit.size.height or fit.scaled.width == fit.size.width


def test_the_nearest_shape_is_taken() -> None:
    buckets = Buckets.around(1024, 1024)
    assert buckets.fit(3000, 3000).size == (1024, 1024)
    assert buckets.fit(1080, 1920).size == (768, 1344)
    assert buckets.fit(10, 10_000).size == (512, 2048)


def test_the_middle_is_kept() -> None:
    image = Image.new("RGB", (60, 20), "black")
    image.paste("white", (20, 0, 40, 20))
    fit = Buckets.only(10, 10).fit(20, 60)
    assert fit == Fit(size=(10, 10), scaled=(10, 30), top=0, left=10)
    assert fitted(image, fit).getpixel((5, 5)) == (255, 255, 255)
    assert fitted(image, fit).size == (10, 10)


BUCKETS = torch.tensor([0, 2, 1, 0, 0, 2, 0, 0, 0, 1])


def order(seed: int = 3, stream: Stream = Stream.RETAIN) -> BucketOrder:
    return BucketOrder(BUCKETS, 4, seed=seed, stream=stream)


def test_a_batch_is_of_one_bucket_and_a_round_shows_each_image_as_often() -> None:
    batches = [order().at(step) for step in range(2 * len(BUCKETS))]
    assert all(len(BUCKETS[batch].unique()) == 1 for batch in batches)
    for round_ in (batches[:10], batches[10:]):
        assert torch.cat(round_).bincount().tolist() == [4] * 10


def test_the_order_of_a_step_needs_none_before_it() -> None:
    ran = order()
    for step in range(57):
        reached = ran.at(step)
    assert torch.equal(reached, order().at(56))
    assert torch.equal(ran.at(3), order().at(3))


def test_seeds_and_streams_differ() -> None:
    orders = [order(seed, stream) for seed in (0, 1) for stream in Stream]
    assert len({tuple(torch.cat([o.at(step) for step in range(10)]).tolist()) for o in orders}) == 4
