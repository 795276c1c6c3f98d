"""Triton kernels: in the interpreter on the CPU, and the cache of pointer tables."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from erasediff_kernels._library import OPS
from erasediff_kernels._triton import lists

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
# An operator's own tests are in the file that hands it to opcheck; 8-bit moments have a file beside them.
OPERATOR_TESTS = [
    path.name
    for path in sorted(HERE.glob("test_*.py"))
    if path.name == "test_moment_codes.py" or any(f"torch.ops.erasediff.{op}.default" in path.read_text() for op in OPS)
]


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
def test_in_the_interpreter() -> None:
    """The interpreter has to be asked for before Triton is imported, hence a process of its own.

    It takes a minute for the losses in float16, which differ from those in bfloat16 by a cast.
    """
    chosen = "cpu-triton and not opcheck and not gradcheck and not (loss and torch.float16)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    result = subprocess.run(
        [*command, "--import-mode=importlib", *(str(HERE / file) for file in OPERATOR_TESTS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


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
