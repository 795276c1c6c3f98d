"""ZeRO 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from erasediff.parallel.zero.layout import Fragment, ReducerOverride, unsupported_reduction, zeros_on_the_host
from erasediff.parallel.zero.reduce_scatter import PerParameterReduceScatter
from erasediff.parallel.zero.stage3_gather import HeldWeights


class PartitionedParameters:
    """ZeRO 3: fp32 partitions of sub-groups, in which this process's parts of parameters lie end to end."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        self.groups = [optimizer.sub_group_to_group_id[index] for index in range(len(self.flats))]
        self._free: list[Tensor] = []
        if not optimizer.offload_optimizer:
            self._free.append(optimizer.grad_partitions_flat_buffer)
            # As under ZeRO 1 and 2; here it is no option.
            optimizer._get_norm_groups = lambda: [torch.zeros(())]
        parameters: list[Any] = [parameter for group in optimizer.fp16_groups for parameter in group]
        self._indices = {parameter.ds_id: index for index, parameter in enumerate(parameters)}
        self._reduction = self._reduction_of(parameters)
        self._weights = HeldWeights(optimizer.parameter_offload)

    def _reduction_of(self, parameters: list[Any]) -> ReducerOverride | None:
        """None where what the engine was told of its gradients is more than a mean in one precision."""
        optimizer = self.optimizer
        group = optimizer.dp_process_group
        processes = torch.distributed.get_world_size(group)
        # Parameters are cut by another handle of the same processes.
        cut_by = {optimizer._get_param_partition_group(parameter) for parameter in parameters}
        ranks = torch.distributed.get_process_group_ranks(group)
        own = {
            **unsupported_reduction(optimizer),
            "offloaded": bool(optimizer.offload_optimizer),
            "quantized": optimizer.all2all_process_group is not None,
            "orthogonalized": optimizer.use_muon,
            "of several groups": any(torch.distributed.get_process_group_ranks(own) != ranks for own in cut_by)
            or optimizer._gradient_averaging_world_size(parameters, processes) != processes,
        }
        if any(own.values()):
            return None
        numels = [parameter.ds_numel for parameter in parameters]
        (dtype,) = optimizer.ipg_buckets
        device = torch.device(optimizer.device)
        scatter = PerParameterReduceScatter(numels, int(optimizer.reduce_bucket_size), dtype, device, group)
        assert scatter.lengths == [parameter.partition_numel() for parameter in parameters]
        if optimizer.ipg_buckets[dtype].buffer is not None:
            # Nothing else needs it while gradients come in.
            scatter.lend(optimizer.ipg_buckets[dtype].buffer)
        return ReducerOverride(optimizer, scatter, self._add, "reduce_ready_partitions_and_remove_grads")

    def _add(self, parameter: Any) -> None:
        assert self._reduction is not None
        # False while a module that is computed in tiles has some left.
        if getattr(parameter, "ds_grad_is_ready", True):
            assert parameter.grad is not None
            self._reduction.scatter.add(self._indices[parameter.ds_id], parameter.grad)
            parameter.grad = None

    @property
    def _partitions(self) -> dict[int, Tensor]:
        """Where each parameter's gradient goes, by ``ds_id``: views into ``grad_partitions_flat_buffer``."""
        return self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # type: ignore[no-any-return]

    def renew(self) -> None:
        optimizer = self.optimizer
        # Also makes the first backward pass overwrite where further ones add.
        optimizer.zero_grad()
        if optimizer.offload_optimizer:
            for flat in self.flats:
                if flat.grad is None:
                    flat.grad = zeros_on_the_host(flat, pinned=optimizer.offload_optimizer_pin_memory)
            return
        is_new = not self._free
        self._room = torch.empty_like(optimizer.grad_partitions_flat_buffer) if is_new else self._free.pop()
        if self._reduction is None:
            self._bind(self._room.zero_())
            return
        if is_new:
            # What was taken before is freed as soon as nobody needs it.
            self._bind(self._room)
        self._reduction.begin([self._room])

    def _bind(self, buffer: Tensor) -> None:
        """DeepSpeed's own reduction writes there from now on."""
        self.optimizer.grad_partitions_flat_buffer = buffer
        offset = 0
        for group in self.optimizer.fp16_groups:
            for parameter in group:
                length = parameter.partition_numel()
                self._partitions[parameter.ds_id] = buffer.narrow(0, offset, length)
                offset += length

    def pop_grads(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            taken: list[Tensor] = [flat.grad for flat in self.flats]  # type: ignore[misc]
            for flat in self.flats:
                flat.grad = None
            return taken
        if self._reduction is not None:
            self._reduction.finish()
        return list(torch.split(self._room, [flat.numel() for flat in self.flats]))

    def set_grads(self, gradients: list[Tensor]) -> None:
        for index, gradient in enumerate(gradients):
            if self.optimizer.offload_optimizer:
                self.flats[index].grad = gradient
            else:
                self.optimizer.averaged_gradients[index] = [gradient]

    def release(self, gradients: list[Tensor]) -> None:
        if gradients and not self.optimizer.offload_optimizer:
            length = sum(gradient.numel() for gradient in gradients)
            self._free.append(gradients[0].as_strided((length,), (1,), 0))

    def keep_gathered(self, held: bool) -> None:
        if self._reduction is not None:
            self._reduction.keep_gathered(held)
        self._weights.keep_gathered(held)

    def fragments(self) -> Iterator[Fragment]:
        optimizer = self.optimizer
        for group in optimizer.fp16_groups:
            for parameter in group:
                index, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = optimizer._get_param_partition_rank(parameter) * parameter.partition_numel()
                real = min(int(length), parameter.ds_numel - start)
                if real > 0:
                    yield Fragment(parameter, start, int(index), int(offset), real)

    @torch.no_grad()
    def refresh(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()
        for index in range(len(self.flats)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
