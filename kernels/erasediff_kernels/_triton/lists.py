# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Kernels over lists of tensors: one launch for all tensors that share their dtypes, through a table of pointers.

A launch has one program per chunk of `CHUNK` elements. Its table, int64 on the device, has one row per tensor,

    first chunk | number of elements | place in the list | address in column 0 | address in column 1 | ...

followed by the row of each chunk. Building it costs a copy to the device, so tables are kept and found again by the
addresses: in the steady state of training, where the allocator hands out the same addresses, nothing is copied.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from erasediff_kernels._triton.language import DTYPES

# Eight blocks per chunk hide the table look-ups, and still leave a model of 10 M parameters with a thousand programs.
CHUNK = 8192
HEADER = 3
CACHED_PLANS = 32

ROW_HEADER = tl.constexpr(HEADER)
ROW_CHUNK = tl.constexpr(CHUNK)


@triton.jit
def find_row(table_ptr, owners_ptr, COLUMNS: tl.constexpr):
    """(pointer to the row, first element, end) of this program's chunk; elements are int64."""
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(owners_ptr + chunk) * (ROW_HEADER + COLUMNS)
    begin = (chunk - tl.load(row_ptr)) * ROW_CHUNK
    begin = tl.multiple_of(begin, ROW_CHUNK)
    return row_ptr, begin, tl.minimum(begin + ROW_CHUNK, tl.load(row_ptr + 1))


@triton.jit
def column(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of the row; not for a column that is absent, since Triton 3.6 cannot return None."""
    pointer = tl.load(row_ptr + ROW_HEADER + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@dataclass(frozen=True, slots=True)
class Launch:
    """Tensors whose columns share their dtypes, and whether all their addresses are multiples of 16 bytes."""

    dtypes: tuple[Any, ...]
    aligned: bool
    table: Tensor
    owners: Tensor
    host: Tensor
    """Source of the table on the host: a CUDA graph copies it again at each replay."""

    @property
    def chunks(self) -> int:
        return self.owners.numel()


_plans: OrderedDict[Any, list[Launch]] = OrderedDict()
_captured: list[list[Launch]] = []


def plan(columns: Sequence[Sequence[Tensor]]) -> list[Launch]:
    """The launches for lists of tensors, aligned with `columns[0]`; an empty list is a column that is absent."""
    tensors = [tensor for column in columns for tensor in column]
    on_cuda = bool(tensors) and tensors[0].is_cuda
    if on_cuda and torch.cuda.is_current_stream_capturing():
        # A graph holds raw pointers to its tables, and fills them only when it is replayed: they outlive the cache, and
        # no eager launch may find them there.
        launches = build(columns)
        _captured.append(launches)
        return launches
    key = (
        torch.cuda.current_stream().cuda_stream if on_cuda else None,
        tuple(map(len, columns)),
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(attrgetter("dtype"), tensors)),
        tuple(map(Tensor.numel, columns[0])),
    )
    cached = _plans.get(key)
    if cached is not None:
        _plans.move_to_end(key)
        return cached
    launches = _plans[key] = build(columns)
    if len(_plans) > CACHED_PLANS:
        _plans.popitem(last=False)
    return launches


def build(columns: Sequence[Sequence[Tensor]]) -> list[Launch]:
    groups: dict[Any, list[tuple[int, ...]]] = {}
    for place, first in enumerate(columns[0]):
        if first.numel() == 0:
            continue
        row = [column[place] if column else None for column in columns]
        dtypes = tuple(None if tensor is None else DTYPES[tensor.dtype] for tensor in row)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in row]
        aligned = all(address % 16 == 0 for address in addresses)
        groups.setdefault((dtypes, aligned), []).append((first.numel(), place, *addresses))
    device = columns[0][0].device if columns[0] else None
    return [Launch(dtypes, aligned, *upload(rows, device)) for (dtypes, aligned), rows in groups.items()]


def upload(rows: Sequence[tuple[int, ...]], device: torch.device | None) -> tuple[Tensor, Tensor, Tensor]:
    """(table, owners, host copy of both)."""
    body = torch.tensor(rows, dtype=torch.int64)
    chunks = (body[:, :1] + CHUNK - 1) // CHUNK
    first_chunk = chunks.cumsum(dim=0) - chunks
    owners = torch.repeat_interleave(chunks.squeeze(1))
    host = torch.cat((torch.cat((first_chunk, body), dim=1).flatten(), owners))
    if device is not None and device.type == "cuda":
        host = host.pin_memory()
    table = host.to(device, non_blocking=True)
    return table[: -len(owners)], table[-len(owners) :], host
