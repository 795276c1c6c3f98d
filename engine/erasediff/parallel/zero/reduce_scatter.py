"""Bucketed reduce-scatter of gradients during the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

LARGEST_BUCKET = 1 << 24
"""Elements beyond which a collective is no faster, only later."""
MAX_INFLIGHT_BUCKETS = 2
"""Full buckets under way before the backward pass waits for the oldest; of a longer parameter's, one."""
MAX_OPEN_BUCKETS = MAX_INFLIGHT_BUCKETS + 5
"""Buckets in memory: gradients do not come in the order of parameters, and of Stable Diffusion's UNet five are open."""


@dataclass(slots=True)
class Bucket:
    """Parameters whose gradients are reduced together.

    Attributes:
        flat: Index of the flat gradient that takes this process's part of the mean.
        start: Offset of that part in the flat gradient.
        sizes: Elements of each process's part.
        members: Indices of the parameters.
        buffer: Gradients of this process as they come in, one process's part after the other's; at least
            sum(sizes) elements.
        missing: Members whose gradients have not come in since ``buffer`` was allocated.
        is_written: The mean of earlier gradients is in the flat gradient already, to be added to.
    """

    flat: int
    start: int
    sizes: list[int]
    members: list[int] = field(default_factory=list)
    buffer: Tensor | None = None
    missing: set[int] = field(default_factory=set)
    is_written: bool = False


@dataclass(frozen=True, slots=True)
class BucketSlice:
    """Elements of a parameter in its bucket, or in each process's part of it.

    Attributes:
        bucket: Bucket of the parameter.
        offset: First element.
        length: Number of elements.
    """

    bucket: Bucket
    offset: int
    length: int


class GradientScatter(ABC):
    """Reduce-scatter of gradients in buckets, each as soon as it is full, beside the rest of the backward pass.

    Each gradient is read once, to its bucket, and the bucket's mean over processes is written to where it stays.

    NCCL reduces. Between CPUs each process sends every other its part and adds up what it gets, which takes a fifth
    of the time of gloo's reduce-scatter.

    Args:
        bucket_numel: Most elements of gradients that are reduced together, of more than one parameter.
        dtype: Dtype of what is sent.
        device: Device of what is sent.
        group: Processes; each must see the gradients in the same order. None for the default group.
    """

    def __init__(
        self, bucket_numel: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        self.full = min(bucket_numel, LARGEST_BUCKET)
        """Elements that a bucket of several parameters does not exceed."""
        self.dtype = dtype
        self.device = device
        self.group = group
        self.processes = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._buckets: list[Bucket] = []
        self._places: list[BucketSlice] = []
        self._free: dict[int, list[Tensor]] = {}
        """Buffers by their length: of full buckets, and of what is received for one."""
        self._under_way: deque[tuple[int, Tensor, Callable[[], None]]] = deque()
        """Elements of a bucket, its buffer, and what waits for it and sees that its mean is in its place."""

    def _fit(self) -> None:
        """Buffers of a small model are no longer than it needs."""
        self.full = min(self.full, max((sum(bucket.sizes) for bucket in self._buckets), default=0))

    @property
    def _exchanges(self) -> bool:
        return self.device.type == "cpu"

    def add_buffers(self, memory: Tensor) -> None:
        """Lend ``memory``, flat and of ``dtype``, for as many buffers as fit; more are allocated if more are open."""
        if self.processes > 1 and self.full:
            for buffer in torch.split(memory, self.full):
                self._give_back(buffer)

    def begin(self, flats: Sequence[Tensor]) -> None:
        """Begin a new gradient, to be written to the one-dimensional ``flats``, whatever they hold."""
        self._flats = flats
        for bucket in self._buckets:
            bucket.is_written = False

    @torch.no_grad()
    def add(self, index: int, gradient: Tensor) -> None:
        """Add this process's whole ``gradient`` of parameter ``index`` to what came in since ``begin``."""
        bucket = self._places[index].bucket
        if self.processes == 1:
            part = self._part(bucket).view(gradient.shape)
            if bucket.is_written:
                part.add_(gradient)
            else:
                part.copy_(gradient)
            bucket.is_written = True
            return
        if bucket.buffer is not None and index not in bucket.missing:
            self._send(bucket)
        if bucket.buffer is None:
            bucket.buffer = self._take_buffer(sum(bucket.sizes))
            bucket.missing = set(bucket.members)
        self._write(gradient.reshape(-1).to(self.dtype), self._room(bucket.buffer, self._places[index]))
        bucket.missing.remove(index)
        if not bucket.missing:
            self._send(bucket)

    @torch.no_grad()
    def finish(self) -> None:
        """End the gradient: parameters that none has come in for have zeros. It is complete after ``wait``."""
        for bucket in self._buckets:
            if bucket.buffer is not None:
                self._send(bucket)
        for bucket in self._buckets:
            if not bucket.is_written:
                self._part(bucket).zero_()

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until the mean of all that was added is in its place."""
        self._wait_until(0)

    @torch.no_grad()
    def abort(self) -> None:
        """Drop the gradient that was begun: open buckets are not reduced, and nothing is under way any more.

        The ranks must have begun the same collectives, for which this waits.
        """
        self.wait()
        for bucket in self._buckets:
            if bucket.buffer is not None:
                self._give_back(bucket.buffer)
            bucket.buffer, bucket.missing, bucket.is_written = None, set(), False

    @abstractmethod
    def _room(self, buffer: Tensor, place: BucketSlice) -> Tensor:
        """View of what a parameter has of its bucket's buffer."""

    @abstractmethod
    def _write(self, gradient: Tensor, room: Tensor) -> None:
        """The ``processes``-th part of a flat gradient."""

    @abstractmethod
    def _reduce(self, sent: Tensor, sizes: list[int], part: Tensor, adds: bool) -> Callable[[], None]:
        """By collectives that reduce. Returns what waits for them and writes the mean to ``part``, or adds it there."""

    def _part(self, bucket: Bucket) -> Tensor:
        return self._flats[bucket.flat].narrow(0, bucket.start, bucket.sizes[self.rank])

    def _take_buffer(self, numel: int) -> Tensor:
        kept = (self.full, self.processes * self.full)
        length = next((length for length in kept if numel <= length), numel)
        free = self._free.get(length)
        return free.pop() if free else torch.empty(length, dtype=self.dtype, device=self.device)

    def _give_back(self, buffer: Tensor) -> None:
        # Of a longer parameter, memory is there while it is needed.
        if len(buffer) in (self.full, self.processes * self.full):
            self._free.setdefault(len(buffer), []).append(buffer)

    def _send(self, bucket: Bucket) -> None:
        assert bucket.buffer is not None
        buffer, bucket.buffer = bucket.buffer, None
        for index in bucket.missing:
            self._room(buffer, self._places[index]).zero_()
        numel = sum(bucket.sizes)
        self._wait_until(MAX_INFLIGHT_BUCKETS * self.full - numel)
        exchange = self._exchange if self._exchanges else self._reduce
        part, adds = self._part(bucket), bucket.is_written
        bucket.is_written = True
        self._under_way.append((numel, buffer, exchange(buffer[:numel], bucket.sizes, part, adds)))

    def _wait_until(self, numel: int) -> None:
        """No more elements than that are under way."""
        while self._under_way and sum(each for each, *_ in self._under_way) > numel:
            _, buffer, settle = self._under_way.popleft()
            settle()
            self._give_back(buffer)

    def _exchange(self, sent: Tensor, sizes: list[int], part: Tensor, adds: bool) -> Callable[[], None]:
        received = self._take_buffer(self.processes * len(part))
        parts = received[: self.processes * len(part)]
        kept = [len(part)] * self.processes
        work = _started(dist.all_to_all_single(parts, sent, kept, sizes, group=self.group, async_op=True))

        def settle() -> None:
            work.wait()
            rows = parts.view(self.processes, len(part))
            if adds:
                part.add_(rows.sum(0, dtype=part.dtype))
            else:
                torch.sum(rows, 0, dtype=part.dtype, out=part)
            self._give_back(received)

        return settle


class PerParameterReduceScatter(GradientScatter):
    """Each parameter cut among all processes, as under ZeRO-3: parts of one length, the last filled up with zeros.

    A process's parts lie end to end in one flat gradient, in the order of ``numels``, the parameters' elements.
    """

    def __init__(
        self,
        numels: Sequence[int],
        bucket_numel: int,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(bucket_numel, dtype, device, group)
        self.lengths = [-(-numel // self.processes) for numel in numels]
        # Alone, a process has nothing to send: each gradient goes where it stays.
        limit = self.full // self.processes if self.processes > 1 else 0
        start = 0
        for index, length in enumerate(self.lengths):
            if not self._buckets or self._buckets[-1].sizes[0] + length > limit:
                self._buckets.append(Bucket(0, start, [0] * self.processes))
            bucket = self._buckets[-1]
            self._places.append(BucketSlice(bucket, bucket.sizes[0], length))
            bucket.members.append(index)
            bucket.sizes = [bucket.sizes[0] + length] * self.processes
            start += length
        self._fit()

    def _room(self, buffer: Tensor, place: BucketSlice) -> Tensor:
        length = place.bucket.sizes[0]
        rows = buffer[: self.processes * length].view(self.processes, length)
        return rows.narrow(1, place.offset, place.length)

    def _write(self, gradient: Tensor, room: Tensor) -> None:
        length = room.shape[1]
        if not length:
            return
        whole, rest = divmod(len(gradient), length)
        torch.div(gradient[: whole * length].view(whole, length), self.processes, out=room[:whole])
        if whole < self.processes:
            room[whole:].zero_()
            torch.div(gradient[whole * length :], self.processes, out=room[whole, :rest])

    def _reduce(self, sent: Tensor, sizes: list[int], part: Tensor, adds: bool) -> Callable[[], None]:
        is_direct = not adds and part.dtype == self.dtype
        mean = part if is_direct else torch.empty_like(part, dtype=self.dtype)
        work = _started(dist.reduce_scatter_tensor(mean, sent, group=self.group, async_op=True))

        def settle() -> None:
            work.wait()
            if adds:
                part.add_(mean)
            elif not is_direct:
                part.copy_(mean)

        return settle


class FlatReduceScatter(GradientScatter):
    """Parameters end to end in groups that are cut into as many ranges as there are processes, as under ZeRO 1 and 2.

    parameters: (group, position within it, elements) of each
    ranges:     of each group the length of one range, that of its flat gradient
    """

    def __init__(
        self,
        parameters: Sequence[tuple[int, int, int]],
        ranges: Sequence[int],
        bucket_numel: int,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(bucket_numel, dtype, device, group)
        if self._exchanges:
            # A bucket may all be of one range, whose process gets as much from each.
            self.full //= self.processes
        limit = self.full if self.processes > 1 else 0
        found: dict[int, BucketSlice] = {}
        self._gaps: list[tuple[int, int, int]] = []
        for flat, length in enumerate(ranges):
            end, begin = 0, self.rank * length
            members = sorted((at, numel, i) for i, (its, at, numel) in enumerate(parameters) if its == flat)
            for at, numel, index in members:
                last = self._buckets[-1] if self._buckets else None
                joins = last is not None and last.flat == flat and at == end and sum(last.sizes) + numel <= limit
                if not joins:
                    self._gaps.append((flat, end, at))
                    last = Bucket(flat, min(max(at - begin, 0), length), [0] * self.processes)
                    self._buckets.append(last)
                assert last is not None
                found[index] = BucketSlice(last, sum(last.sizes), numel)
                last.members.append(index)
                end = at + numel
                for process in range(at // length, -(-end // length)):
                    last.sizes[process] += min(end, (process + 1) * length) - max(at, process * length)
            self._gaps.append((flat, end, self.processes * length))
        self._places = [found[index] for index in range(len(parameters))]
        self._lengths = list(ranges)
        self._fit()

    def begin(self, flats: Sequence[Tensor]) -> None:
        super().begin(flats)
        for flat, start, end in self._gaps:
            length = self._lengths[flat]
            first, last = (min(max(position - self.rank * length, 0), length) for position in (start, end))
            flats[flat][first:last].zero_()

    def _room(self, buffer: Tensor, place: BucketSlice) -> Tensor:
        return buffer.narrow(0, place.offset, place.length)

    def _write(self, gradient: Tensor, room: Tensor) -> None:
        torch.div(gradient, self.processes, out=room)

    def _reduce(self, sent: Tensor, sizes: list[int], part: Tensor, adds: bool) -> Callable[[], None]:
        owned = torch.split(sent, sizes)
        ranks = range(self.processes) if self.group is None else dist.get_process_group_ranks(self.group)
        works = [
            _started(dist.reduce(theirs, dst=rank, group=self.group, async_op=True))
            for rank, theirs in zip(ranks, owned, strict=True)
            if len(theirs)
        ]

        def settle() -> None:
            for work in works:
                work.wait()
            if adds:
                part.add_(owned[self.rank])
            else:
                part.copy_(owned[self.rank])

        return settle


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is not in the group"
    return work
