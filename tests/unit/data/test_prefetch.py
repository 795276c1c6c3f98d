"""Batches one step ahead: the same ones, errors of their own type, and no thread left behind."""

import threading

import pytest
import torch

from erasediff.data.prefetch import Prefetcher
from erasediff.errors import UserError

SECONDS = 20.0


class Source:
    """Records which steps were loaded and by which threads."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.threads: set[int] = set()
        self.loaded = {step: threading.Event() for step in range(20)}

    def at(self, step: int) -> int:
        self.steps.append(step)
        self.threads.add(threading.get_ident())
        self.loaded[step].set()
        if step == 13:
            raise UserError("The cache file is damaged.")
        return step * step


def test_the_next_step_is_loaded_before_it_is_asked_for() -> None:
    source = Source()
    with Prefetcher(source.at, stop=3) as batches:
        assert batches.at(0) == 0
        assert source.loaded[1].wait(SECONDS)
        assert [batches.at(step) for step in (1, 2)] == [1, 4]
    assert source.steps == [0, 1, 2]


def test_steps_out_of_order_are_still_those_asked_for() -> None:
    source = Source()
    with Prefetcher(source.at) as batches:
        assert [batches.at(step) for step in (7, 8, 2, 3, 3, 9)] == [49, 64, 4, 9, 9, 81]
    assert len(source.threads) == 1


def test_an_error_of_the_source_is_raised_where_its_step_is_asked_for() -> None:
    source = Source()
    with Prefetcher(source.at) as batches:
        assert batches.at(12) == 144
        assert source.loaded[13].wait(SECONDS)
        with pytest.raises(UserError, match="damaged"):
            batches.at(13)
        assert batches.at(14) == 196
    with Prefetcher(source.at) as batches:
        batches.at(12)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_no_thread_is_left(error: type[BaseException]) -> None:
    def interrupted() -> None:
        with Prefetcher(Source().at) as batches:
            batches.at(0)
            raise error

    with pytest.raises(error):
        interrupted()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_was_loaded_ahead_is_released_with_the_prefetcher() -> None:
    batches = Prefetcher(Source().at)
    with batches:
        batches.at(0)
    with pytest.raises(ValueError, match="closed"):
        batches.at(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_made_on_the_stream_of_the_caller() -> None:
    stream = torch.cuda.Stream()
    with Prefetcher(lambda step: torch.cuda.current_stream()) as batches, torch.cuda.stream(stream):
        assert [batches.at(step) for step in range(3)] == [stream] * 3
