"""ZeRO 3: partitioned parameters, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from erasediff.parallel.zero.engine import patched
from erasediff.parallel.zero.layout import Fragment, PartitionedLayout, ReducerOverride, unsupported_reduction
from erasediff.parallel.zero.reduce_scatter import PerParameterReduceScatter
from erasediff.parallel.zero.stage3_gather import HeldWeights


class PartitionedParameters(PartitionedLayout):
    """ZeRO 3: fp32 partitions of sub-groups, in which this process's parts of parameters lie end to end.

    Args:
        optimizer: The engine's ``DeepSpeedZeroOptimizer_Stage3``.
        own_reduction: False for DeepSpeed's reduction and gathering, True for ours where the engine's configuration
            allows it.
    """

    def __init__(self, optimizer: Any, *, own_reduction: bool = True) -> None:
        super().__init__(
            optimizer,
            optimizer.fp32_partitioned_groups_flat,
            is_offloaded=bool(optimizer.offload_optimizer),
            pins_memory=optimizer.offload_optimizer_pin_memory,
        )
        self.groups = [optimizer.sub_group_to_group_id[index] for index in range(len(self.flats))]
        self._free: list[Tensor] = []
        if not self.is_offloaded:
            self._free.append(optimizer.grad_partitions_flat_buffer)
        parameters: list[Any] = [parameter for group in optimizer.fp16_groups for parameter in group]
        self._indices = {parameter.ds_id: index for index, parameter in enumerate(parameters)}
        self._weights: HeldWeights | None = None
        if own_reduction:
            self.reduction = self._make_reduction(parameters)
            self._weights = HeldWeights(optimizer.parameter_offload)

    def _make_reduction(self, parameters: list[Any]) -> ReducerOverride | None:
        """None where the engine was configured for more than a mean in one precision."""
        optimizer = self.optimizer
        group = optimizer.dp_process_group
        processes = torch.distributed.get_world_size(group)
        # Parameters are partitioned by another handle of the same processes.
        partition_groups = {optimizer._get_param_partition_group(parameter) for parameter in parameters}
        ranks = torch.distributed.get_process_group_ranks(group)
        unsupported = {
            **unsupported_reduction(optimizer),
            "offloaded": self.is_offloaded,
            "quantized": optimizer.all2all_process_group is not None,
            "orthogonalized": optimizer.use_muon,
            "of several groups": any(torch.distributed.get_process_group_ranks(g) != ranks for g in partition_groups)
            or optimizer._gradient_averaging_world_size(parameters, processes) != processes,
        }
        if any(unsupported.values()):
            return None
        numels = [parameter.ds_numel for parameter in parameters]
        (dtype,) = optimizer.ipg_buckets
        device = torch.device(optimizer.device)
        scatter = PerParameterReduceScatter(numels, int(optimizer.reduce_bucket_size), dtype, device, group)
        assert scatter.lengths == [parameter.partition_numel() for parameter in parameters]
        if optimizer.ipg_buckets[dtype].buffer is not None:
            # Nothing else needs it while gradients come in.
            scatter.add_buffers(optimizer.ipg_buckets[dtype].buffer)
        return ReducerOverride(optimizer, scatter, self._add, "reduce_ready_partitions_and_remove_grads")

    def _add(self, parameter: Any) -> None:
        assert self.reduction is not None
        # False while a module that is computed in tiles has some left.
        if getattr(parameter, "ds_grad_is_ready", True):
            assert parameter.grad is not None
            self.reduction.scatter.add(self._indices[parameter.ds_id], parameter.grad)
            parameter.grad = None

    @property
    def _partitions(self) -> dict[int, Tensor]:
        """Each parameter's gradient buffer, by ``ds_id``: views into ``grad_partitions_flat_buffer``."""
        return self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # type: ignore[no-any-return]

    def stepping(self) -> AbstractContextManager[None]:
        # As under ZeRO 1 and 2; here it is no option.
        if self.is_offloaded:
            return super().stepping()
        return patched(self.optimizer, _get_norm_groups=lambda: [torch.zeros(())])

    def recover(self) -> None:
        for group in self.optimizer.fp16_groups:
            for parameter in group:
                # DeepSpeed's zero_grad knows gradients of accelerators alone.
                parameter.grad = None
        super().recover()
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()
        coordinator.release_backward_leftovers()
        if coordinator.is_record_trace():
            # Of the order of modules, half of which it has seen.
            coordinator._invalidate_trace()
        self.refresh()

    def release(self, gradients: list[Tensor]) -> None:
        if gradients and not self.is_offloaded:
            length = sum(gradient.numel() for gradient in gradients)
            self._free.append(gradients[0].as_strided((length,), (1,), 0))

    def keep_gathered(self, held: bool) -> None:
        super().keep_gathered(held)
        if self._weights is not None:
            self._weights.keep_gathered(held)

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self.optimizer
        for group in optimizer.fp16_groups:
            for parameter in group:
                index, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = optimizer._get_param_partition_rank(parameter) * parameter.partition_numel()
                numel = min(int(length), parameter.ds_numel - start)
                if numel > 0:
                    yield Fragment(parameter, start, int(index), int(offset), numel)

    @torch.no_grad()
    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for index in range(len(self.flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _begin_gradient(self) -> list[Tensor]:
        is_new = not self._free
        self._storage = torch.empty_like(self.optimizer.grad_partitions_flat_buffer) if is_new else self._free.pop()
        if self.reduction is None:
            self._bind(self._storage.zero_())
        elif is_new:
            # What was popped before is freed as soon as nobody needs it.
            self._bind(self._storage)
        return [self._storage]

    def _bind(self, buffer: Tensor) -> None:
        """Let DeepSpeed's own reduction write to ``buffer`` from now on."""
        self.optimizer.grad_partitions_flat_buffer = buffer
        offset = 0
        for group in self.optimizer.fp16_groups:
            for parameter in group:
                length = parameter.partition_numel()
                self._partitions[parameter.ds_id] = buffer.narrow(0, offset, length)
                offset += length

    def _clear_bucket(self, bucket: Any) -> None:
        # Its buffer may be in use by our reduction.
        bucket.clear_params()

    def _popped(self) -> list[Tensor]:
        return list(torch.split(self._storage, [flat.numel() for flat in self.flats]))
