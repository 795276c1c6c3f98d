"""ZeRO 1 and 2: partitioned optimizer state and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.parallel.zero.engine import patched
from erasediff.parallel.zero.layout import Fragment, PartitionedLayout, ReducerOverride, unsupported_reduction
from erasediff.parallel.zero.reduce_scatter import FlatReduceScatter


class PartitionedGradients(PartitionedLayout):
    """ZeRO 1 and 2: one fp32 partition for each group, in which parameters lie end to end.

    Args:
        optimizer: The engine's ``DeepSpeedZeroOptimizer``.
        own_reduction: False for DeepSpeed's reduction, True for ours where the engine's configuration allows it.
    """

    def __init__(self, optimizer: Any, *, own_reduction: bool = True) -> None:
        super().__init__(
            optimizer,
            optimizer.single_partition_of_fp32_groups,
            is_offloaded=bool(optimizer.cpu_offload),
            pins_memory=optimizer.cpu_offload_pin_memory,
        )
        self.groups = list(range(len(self.flats)))
        self._free: list[list[Tensor]] = []
        self._storage: list[Tensor] = []
        if own_reduction:
            self.reduction = self._make_reduction()

    def _make_reduction(self) -> ReducerOverride | None:
        """None where the engine was configured for more than a mean in one precision."""
        optimizer = self.optimizer
        unsupported = {
            **unsupported_reduction(optimizer),
            "offloaded": self.is_offloaded,
            "no mean": not optimizer.gradient_average,
            "orthogonalized": any(optimizer._is_muon_group(group) for group in optimizer.bit16_groups),
            "of several groups": any(
                group is not optimizer.dp_process_group for group in optimizer.real_dp_process_group
            ),
        }
        if any(unsupported.values()):
            return None
        parameters = [(parameter, group) for group in self.groups for parameter in optimizer.bit16_groups[group]]
        self._indices = {id(parameter): index for index, (parameter, _) in enumerate(parameters)}
        positions = []
        for parameter, group in parameters:
            identity = optimizer.get_param_id(parameter)
            first = min(optimizer.param_to_partition_ids[group][identity])
            offset = optimizer.grad_partition_insertion_offset[group][first][identity]
            positions.append((group, int(first * optimizer.partition_size[group] + offset), parameter.numel()))
        ranges = [int(optimizer.partition_size[group]) for group in self.groups]
        (dtype,) = optimizer.ipg_buckets
        numel, device = int(optimizer.reduce_bucket_size), torch.device(optimizer.device)
        scatter = FlatReduceScatter(positions, ranges, numel, dtype, device, optimizer.dp_process_group)
        names = "process_gradients", "reduce_ready_partitions_and_remove_grads"
        return ReducerOverride(optimizer, scatter, self._add, *names)

    def _add(self, parameter: nn.Parameter, group: int) -> None:
        assert self.reduction is not None
        optimizer = self.optimizer
        if optimizer.use_grad_accum_attribute:
            optimizer._fill_param_grad_accum_attribute(parameter)
        gradient = optimizer.get_gradient_for_reduction(parameter)
        # ZeRO-1 adds up whole gradients, and averages their sum. Not ready while a module in tiles has some left.
        is_due = optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()
        if is_due and gradient is not None and getattr(parameter, "ds_grad_is_ready", True):
            self.reduction.scatter.add(self._indices[id(parameter)], gradient)
            optimizer.clear_grad_attribute(parameter)

    def stepping(self) -> AbstractContextManager[None]:
        # No pass over the retain gradient for its norm, nor a wait for it: the update skips what is not finite.
        if self.is_offloaded:
            return super().stepping()
        return patched(self.optimizer, compute_grad_norm=False, check_grad_overflow=False)

    def recover(self) -> None:
        super().recover()
        optimizer = self.optimizer
        optimizer.ready_for_gradients = False
        optimizer.grads_in_partition = None
        optimizer.extra_large_param_to_reduce.clear()
        optimizer._clear_previous_reduced_grads()
        for group in self.groups:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None

    def release(self, gradients: list[Tensor]) -> None:
        if gradients and self.reduction is not None:
            self._free.append(gradients)

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self.optimizer
        for group in self.groups:
            rank = torch.distributed.get_rank(optimizer.real_dp_process_group[group])
            size = int(optimizer.partition_size[group])
            for parameter in optimizer.params_in_partition[group]:
                identity = optimizer.get_param_id(parameter)
                start = int(optimizer.grad_start_offset[group][rank][identity])
                offset = int(optimizer.grad_partition_insertion_offset[group][rank][identity])
                yield Fragment(parameter, start, group, offset, min(parameter.numel() - start, size - offset))

    def refresh(self) -> None:
        self.optimizer.update_lp_params()

    def _reset_micro_steps(self) -> None:
        # With the optimizer offloaded, the first backward pass overwrites and further ones add.
        self.optimizer.micro_step_id = -1

    def _begin_gradient(self) -> list[Tensor]:
        if self.reduction is not None:
            dtype = self.optimizer.gradient_accumulation_dtype
            self._storage = self._free.pop() if self._free else [torch.empty_like(f, dtype=dtype) for f in self.flats]
        return self._storage

    def _clear_bucket(self, bucket: Any) -> None:
        bucket.clear()

    def _popped(self) -> list[Tensor]:
        if self.reduction is not None:
            return self._storage
        optimizer = self.optimizer
        parts = (optimizer.averaged_gradients[group] for group in self.groups)
        popped = [torch.cat([part.reshape(-1) for part in each]) for each in parts]
        for group in self.groups:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        return popped

    def _add_rest(self) -> None:
        if not self.optimizer.partition_gradients:
            # Of an earlier micro-batch alone.
            for group in self.groups:
                for parameter in self.optimizer.bit16_groups[group]:
                    self._add(parameter, group)

    def _wait_for_offload(self) -> None:
        self.optimizer._wait_for_offload_copies()
