"""The pointer tables of Triton kernels over lists, and their cache."""

import pytest
import torch

pytest.importorskip("triton")

from erasediff_kernels._triton import lists


def columns(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def test_table_rows_and_chunks() -> None:
    first, second = columns((3,), (0,), (2 * lists.CHUNK + 1,)), columns((3,), (0,), (2 * lists.CHUNK + 1,))
    (launch,) = lists.plan((first, second, []))
    assert launch.dtypes == (lists.DTYPES[torch.float32], lists.DTYPES[torch.float32], None)
    assert launch.owners.tolist() == [0, 1, 1, 1]
    rows = launch.table.view(-1, lists.HEADER + 3).tolist()
    assert rows[0] == [0, 3, 0, first[0].data_ptr(), second[0].data_ptr(), 0]
    assert rows[1] == [1, 2 * lists.CHUNK + 1, 2, first[2].data_ptr(), second[2].data_ptr(), 0]


def test_one_launch_for_each_set_of_dtypes_and_alignment() -> None:
    buffer = torch.zeros(64)
    first = [*columns((4,), (5,)), *columns((4,), dtype=torch.bfloat16), buffer[1:5]]
    launches = lists.plan((first, []))
    assert [(launch.chunks, launch.aligned) for launch in launches] == [(2, True), (1, True), (1, False)]


def test_tables_are_found_again_by_address_shape_and_dtype() -> None:
    first = columns((4,), (5,))
    launches = lists.plan((first,))
    assert lists.plan((list(first),)) is launches
    assert lists.plan(([first[0].view(torch.int32).view(torch.float32), first[1]],)) is launches
    assert lists.plan(([first[0][:3], first[1]],)) is not launches
    assert lists.plan(([first[0].view(torch.float16), first[1]],)) is not launches
    assert lists.plan((first, first)) is not launches


def test_cache_of_tables_is_bounded() -> None:
    kept = [columns((4,)) for _ in range(lists.CACHED_PLANS + 5)]
    for tensors in kept:
        lists.plan((tensors,))
    assert len(lists._plans) == lists.CACHED_PLANS


def test_no_tensors_no_launch() -> None:
    assert lists.plan(([], [])) == []
    assert lists.plan((columns((0,)),)) == []
