"""Batches are a function of (seed, stream, step), whatever was drawn before and however many ranks there are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erasediff.data import GlobalBatches, Images, Stream
from erasediff.data.batch_order import BucketOrder, first_shown
from erasediff.data.batches import stacked


def numbered(count: int) -> Images:
    """Images whose pixel, label and id are their number."""
    numbers = torch.arange(count)
    return Images(numbers.float().reshape(count, 1, 1, 1), numbers, numbers)


def drawn(batches: GlobalBatches, steps: range) -> list[int]:
    return [int(number) for step in steps for number in batches.at(step)["sample"].flatten()]


@given(count=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 2**63 - 1))
def test_each_epoch_shows_each_image_once(count: int, batch_size: int, seed: int) -> None:
    batches = GlobalBatches(numbered(count), batch_size, seed=seed)
    numbers = drawn(batches, range(-(-3 * count // batch_size)))
    for epoch in range(3):
        assert sorted(numbers[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_step_can_be_looked_up_without_those_before_it() -> None:
    ran = GlobalBatches(numbered(50), 16, seed=3, label_dropout=0.3, null_label=50)
    for step in range(100):
        reached = ran.at(step)
    resumed = GlobalBatches(numbered(50), 16, seed=3, label_dropout=0.3, null_label=50).at(99)
    assert all(torch.equal(reached[name], resumed[name]) for name in reached)


def test_samples_order_and_dropped_labels_are_those_of_earlier_versions() -> None:
    """A run that an earlier version began goes on with the images that it would have seen."""
    arguments = {"seed": 11, "stream": Stream.FORGET}
    shown = [[0, 2, 5, 1], [4, 3, 6, 0], [4, 3, 2, 1], [6, 5, 3, 0], [2, 6, 5, 4]]
    labels = [[9, 2, 9, 9], [4, 9, 6, 9], [9, 3, 2, 1], [6, 9, 3, 9], [2, 9, 9, 4]]
    batches = GlobalBatches(numbered(7), 4, **arguments, label_dropout=0.4, null_label=9)
    assert [drawn(batches, range(step, step + 1)) for step in range(5)] == shown
    assert [batches.at(step)["class_labels"].tolist() for step in range(5)] == labels
    order = BucketOrder(torch.tensor([0, 2, 1, 0, 0, 2, 0, 0, 0, 1]), 3, seed=11, stream=Stream.RETAIN)
    of_three_sizes = [[3, 7, 6], [8, 4, 0], [1, 5, 5], [7, 4, 8], [6, 3, 0], [1, 1, 5]]
    of_three_sizes += [[0, 8, 7], [2, 9, 2], [6, 4, 3], [9, 2, 9], [8, 3, 4], [7, 6, 0]]
    assert [order.at(step).tolist() for step in range(12)] == of_three_sizes


@given(size=st.integers(2, 60), batch_size=st.integers(1, 9), steps=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
def test_the_images_that_a_run_sees_are_known_before_and_come_in_the_order_of_the_whole_set(
    size: int, batch_size: int, steps: int, seed: int
) -> None:
    arguments = {"seed": seed, "stream": Stream.FORGET}
    whole = BucketOrder(torch.zeros(size, dtype=torch.int64), batch_size, **arguments)
    seen = torch.cat([whole.at(step) for step in range(steps)])
    numbers = first_shown(size, steps * batch_size, **arguments)
    assert whole.shown(steps) == len(seen.unique())
    if numbers is None:
        assert len(seen.unique()) == size
        return
    assert numbers.tolist() == seen.sort().values.tolist()
    part = BucketOrder(torch.zeros(len(numbers), dtype=torch.int64), batch_size, **arguments, numbers=numbers)
    assert torch.cat([numbers[part.at(step)] for step in range(steps)]).tolist() == seen.tolist()
    longer = first_shown(size, (steps + 1) * batch_size, **arguments)
    assert longer is None or set(numbers.tolist()) < set(longer.tolist())


@given(buckets=st.lists(st.integers(0, 2), min_size=1, max_size=30), batch_size=st.integers(1, 5))
def test_the_steps_that_show_every_image_are_counted(buckets: list[int], batch_size: int) -> None:
    order = BucketOrder(torch.tensor(buckets), batch_size, seed=0, stream=Stream.RETAIN)
    needed = order.steps_to_show_all()
    for steps in (1, needed - 1, needed):
        shown = {number for step in range(steps) for number in order.at(step).tolist()}
        assert order.shown(steps) == len(shown)
        assert (len(shown) == len(buckets)) == (steps >= needed)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_cut_the_same_global_batch(world_size: int) -> None:
    arguments = {"seed": 1, "label_dropout": 0.3, "null_label": 50}
    whole = GlobalBatches(numbered(50), 16, **arguments)
    ranks = [
        GlobalBatches(numbered(50), 16, **arguments, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in (0, 3, 11):
        parts = [batches.at(step) for batches in ranks]
        for name, value in whole.at(step).items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)


def test_seeds_and_streams_have_orders_of_their_own() -> None:
    orders = [
        drawn(GlobalBatches(numbered(50), 50, seed=seed, stream=stream), range(1))
        for seed in (0, 1)
        for stream in Stream
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_epochs_differ_and_every_image_can_come_first() -> None:
    batches = GlobalBatches(numbered(10), 10, seed=0)
    first = torch.tensor([drawn(batches, range(step, step + 1))[0] for step in range(2000)])
    assert (first.bincount(minlength=10) - 200).abs().max() < 5 * 200**0.5


def test_labels_are_dropped_at_the_asked_rate_and_only_to_the_null_label() -> None:
    batches = GlobalBatches(numbered(50), 50, seed=0, label_dropout=0.1, null_label=50)
    kept, dropped = 0, 0
    for step in range(200):
        batch = batches.at(step)
        is_null = batch["class_labels"] == 50
        assert torch.equal(batch["class_labels"][~is_null], batch["sample"].flatten().long()[~is_null])
        kept, dropped = kept + int((~is_null).sum()), dropped + int(is_null.sum())
    assert abs(dropped / (kept + dropped) - 0.1) < 0.01


def test_an_unconditional_batch_has_no_labels() -> None:
    batch = GlobalBatches(numbered(5), 4, seed=0, conditional=False, label_dropout=0.1).at(0)
    assert set(batch) == {"sample", "sample_ids"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 5, "world_size": 2},
        {"batch_size": 4, "rank": 2, "world_size": 2},
        {"batch_size": 4, "label_dropout": 0.1},
        {"batch_size": 4, "label_dropout": 1.0, "null_label": 5},
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"batch|label_dropout"):
        GlobalBatches(numbered(5), **arguments, seed=0)


def test_rows_are_stacked_and_only_floating_point_ones_converted() -> None:
    rows = [
        {"sample": torch.full((2, 3), number + 0.1, dtype=torch.float16), "ids": torch.tensor(number)}
        for number in range(3)
    ]
    batch = stacked(rows, "cpu", torch.float32)
    assert torch.equal(batch["sample"], torch.stack([row["sample"] for row in rows]).float())
    assert batch["ids"].tolist() == [0, 1, 2]
    assert batch["ids"].dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_gpu_while_rows_go_there() -> None:
    rows = [{"sample": torch.randn(4, 8, 8, dtype=torch.float16), "ids": torch.tensor(number)} for number in range(3)]
    stacked(rows, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = stacked(rows, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch["sample"].cpu(), torch.stack([row["sample"] for row in rows]).float())
