"""ZeRO 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.parallel.zero.layout import Fragment, ReducerOverride, unsupported_reduction, zeros_on_the_host
from erasediff.parallel.zero.reduce_scatter import FlatReduceScatter


class PartitionedGradients:
    """ZeRO 1 and 2: one fp32 partition for each group, in which parameters lie end to end.

    With the optimizer offloaded, the gradients of a partition are in its ``grad`` after a backward pass.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.groups = list(range(len(self.flats)))
        self._free: list[list[Tensor]] = []
        self._reduction = self._reduction_of()
        if not optimizer.cpu_offload:
            # No pass over the retain gradient for its norm, nor a wait for it: the update skips what is not finite.
            optimizer.compute_grad_norm = optimizer.check_grad_overflow = False

    def _reduction_of(self) -> ReducerOverride | None:
        """None where what the engine was told of its gradients is more than a mean in one precision."""
        optimizer = self.optimizer
        own = {
            **unsupported_reduction(optimizer),
            "offloaded": optimizer.cpu_offload,
            "no mean": not optimizer.gradient_average,
            "orthogonalized": any(optimizer._is_muon_group(group) for group in optimizer.bit16_groups),
            "of several groups": any(own is not optimizer.dp_process_group for own in optimizer.real_dp_process_group),
        }
        if any(own.values()):
            return None
        parameters = [(parameter, index) for index in self.groups for parameter in optimizer.bit16_groups[index]]
        self._indices = {id(parameter): place for place, (parameter, _) in enumerate(parameters)}
        places = []
        for parameter, index in parameters:
            identity = optimizer.get_param_id(parameter)
            first = min(optimizer.param_to_partition_ids[index][identity])
            offset = optimizer.grad_partition_insertion_offset[index][first][identity]
            places.append((index, int(first * optimizer.partition_size[index] + offset), parameter.numel()))
        ranges = [int(optimizer.partition_size[index]) for index in self.groups]
        (dtype,) = optimizer.ipg_buckets
        numel, device = int(optimizer.reduce_bucket_size), torch.device(optimizer.device)
        scatter = FlatReduceScatter(places, ranges, numel, dtype, device, optimizer.dp_process_group)
        names = "process_gradients", "reduce_ready_partitions_and_remove_grads"
        return ReducerOverride(optimizer, scatter, self._add, *names)

    def _add(self, parameter: nn.Parameter, group: int) -> None:
        assert self._reduction is not None
        optimizer = self.optimizer
        if optimizer.use_grad_accum_attribute:
            optimizer._fill_param_grad_accum_attribute(parameter)
        gradient = optimizer.get_gradient_for_reduction(parameter)
        # ZeRO-1 adds up whole gradients, and averages their sum. Not ready while a module in tiles has some left.
        is_due = optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()
        if is_due and gradient is not None and getattr(parameter, "ds_grad_is_ready", True):
            self._reduction.scatter.add(self._indices[id(parameter)], gradient)
            optimizer.clear_grad_attribute(parameter)

    def renew(self) -> None:
        optimizer = self.optimizer
        # With the optimizer offloaded, the first backward pass overwrites and further ones add.
        optimizer.micro_step_id = -1
        optimizer.zero_grad()
        if optimizer.cpu_offload:
            for flat in self.flats:
                if flat.grad is None:
                    flat.grad = zeros_on_the_host(flat, pinned=optimizer.cpu_offload_pin_memory)
        if self._reduction is not None:
            dtype = optimizer.gradient_accumulation_dtype
            self._room = self._free.pop() if self._free else [torch.empty_like(f, dtype=dtype) for f in self.flats]
            self._reduction.begin(self._room)

    def pop_grads(self) -> list[Tensor]:
        optimizer = self.optimizer
        if optimizer.cpu_offload:
            optimizer._wait_for_offload_copies()
            taken: list[Tensor] = [flat.grad for flat in self.flats]  # type: ignore[misc]
            for flat in self.flats:
                flat.grad = None
            return taken
        if self._reduction is not None:
            if not optimizer.partition_gradients:
                # Of an earlier micro-batch alone.
                for group in self.groups:
                    for parameter in optimizer.bit16_groups[group]:
                        self._add(parameter, group)
            self._reduction.finish()
            return self._room
        taken = [torch.cat([p.reshape(-1) for p in optimizer.averaged_gradients[index]]) for index in self.groups]
        for index in self.groups:
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None
        return taken

    def set_grads(self, gradients: list[Tensor]) -> None:
        for index, gradient in zip(self.groups, gradients, strict=True):
            if self.optimizer.cpu_offload:
                self.flats[index].grad = gradient
            else:
                self.optimizer.averaged_gradients[index] = [gradient]

    def release(self, gradients: list[Tensor]) -> None:
        if gradients and self._reduction is not None:
            self._free.append(gradients)

    def keep_gathered(self, held: bool) -> None:
        if self._reduction is not None:
            self._reduction.keep_gathered(held)

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self.optimizer
        for index in self.groups:
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[index])
            size = int(optimizer.partition_size[index])
            for parameter in optimizer.params_in_partition[index]:
                identity = optimizer.get_param_id(parameter)
                start = int(optimizer.grad_start_offset[index][rank][identity])
                offset = int(optimizer.grad_partition_insertion_offset[index][rank][identity])
                yield Fragment(parameter, start, index, offset, min(parameter.numel() - start, size - offset))

    def refresh(self) -> None:
        self.optimizer.update_lp_params()
