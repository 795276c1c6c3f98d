"""ZeRO 3."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from erasediff.gradients.deepspeed.buckets import in_buckets
from erasediff.gradients.deepspeed.layout import Fragment
from erasediff.gradients.deepspeed.partitions import OwnReduction, more_than_a_mean, zeros_on_the_host
from erasediff.gradients.scatter import ScatteredParts

HELD = "held for the next pass"
"""Stands among the modules that are at work with a parameter."""


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
        offload = optimizer.parameter_offload
        parameters = list(offload.module.parameters())
        limit = min(offload._max_reuse_distance_in_numel, offload._max_available_parameters_in_numel)
        self._holdable = parameters if sum(parameter.ds_numel for parameter in parameters) <= limit else []
        self._gathering: list[Gathered] = []
        self._waiting: list[RemovableHandle] = []
        self._hooks: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = []
        """What ``_pass_by`` has emptied, and what was there."""
        self._linear: Callable[..., Tensor] | None = None
        """What ``torch.nn.functional.linear`` was before ``_use_torchs_linear``."""

    def _reduction_of(self, parameters: list[Any]) -> OwnReduction | None:
        """None where what the engine was told of its gradients is more than a mean in one precision."""
        optimizer = self.optimizer
        group = optimizer.dp_process_group
        processes = torch.distributed.get_world_size(group)
        # Parameters are cut by another handle of the same processes.
        cut_by = {optimizer._get_param_partition_group(parameter) for parameter in parameters}
        ranks = torch.distributed.get_process_group_ranks(group)
        own = {
            **more_than_a_mean(optimizer),
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
        scatter = ScatteredParts(numels, int(optimizer.reduce_bucket_size), dtype, device, group)
        assert scatter.lengths == [parameter.partition_numel() for parameter in parameters]
        if optimizer.ipg_buckets[dtype].buffer is not None:
            # Nothing else needs it while gradients come in.
            scatter.lend(optimizer.ipg_buckets[dtype].buffer)
        return OwnReduction(optimizer, scatter, self._add, "reduce_ready_partitions_and_remove_grads")

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

    def take(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            taken: list[Tensor] = [flat.grad for flat in self.flats]  # type: ignore[misc]
            for flat in self.flats:
                flat.grad = None
            return taken
        if self._reduction is not None:
            self._reduction.finish()
        return list(torch.split(self._room, [flat.numel() for flat in self.flats]))

    def put(self, gradients: list[Tensor]) -> None:
        for index, gradient in enumerate(gradients):
            if self.optimizer.offload_optimizer:
                self.flats[index].grad = gradient
            else:
                self.optimizer.averaged_gradients[index] = [gradient]

    def reuse(self, gradients: list[Tensor]) -> None:
        if gradients and not self.optimizer.offload_optimizer:
            length = sum(gradient.numel() for gradient in gradients)
            self._free.append(gradients[0].as_strided((length,), (1,), 0))

    def hold(self, held: bool) -> None:
        """The whole model or nothing, where both ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance`` are
        at least as many. DeepSpeed cuts a parameter only if no module is at work with it, and before an update all.
        """
        if self._reduction is not None:
            self._reduction.hold(held)
        for parameter in self._holdable:
            change = parameter.ds_active_sub_modules.add if held else parameter.ds_active_sub_modules.discard
            change(HELD)
        if held and self._holdable:
            self._use_torchs_linear()
        if held and self._can_gather():
            self._pass_by()
            self._gather()
        elif not held:
            for gathered in self._gathering:
                gathered.wait()
            for handle in self._waiting:
                handle.remove()
            for hooks, before in self._hooks:
                since = {key: hook for key, hook in hooks.items() if key not in before}
                hooks.clear()
                hooks.update(before)
                hooks.update(since)
            self._gathering, self._waiting, self._hooks = [], [], []
            if self._linear is not None:
                functional.linear, self._linear = self._linear, None

    def _can_gather(self) -> bool:
        """Whether all weights may be whole, and DeepSpeed has seen in which order modules run and whose they use."""
        offload = self.optimizer.parameter_offload
        is_quantized = offload.zero_quantized_weights or offload.zero_quantized_nontrainable_weights
        is_quiet = all(parameter.ds_status.name != "INFLIGHT" for parameter in self._holdable)
        coordinator = offload.get_param_coordinator()
        return bool(self._holdable) and is_quiet and not is_quantized and coordinator.is_complete_trace()

    def _gather(self) -> None:
        """Send for all weights at once; a module waits only for those that it needs.

        DeepSpeed sends for them from its hooks around each module, of which those before and after both passes would
        find out, over and over, that there is nothing to do.
        """
        offload = self.optimizer.parameter_offload
        order = offload.get_param_coordinator()._PartitionedParameterCoordinator__param_order
        used = dict.fromkeys([*(traced.param for traced in order), *self._holdable])
        cut = [parameter for parameter in used if parameter.ds_status.name == "NOT_AVAILABLE"]
        of: dict[nn.Parameter, Gathered] = {}
        for together in in_buckets(cut, lambda parameter: parameter.ds_numel, offload._prefetch_bucket_sz):
            gathered = Gathered(together[0].all_gather_coalesced(together))
            self._gathering.append(gathered)
            of |= dict.fromkeys(together, gathered)
        for module in offload.module.modules():
            own = [*module.named_parameters(recurse=False), *module.ds_external_parameters()]
            needed = list(dict.fromkeys(of[parameter] for _, parameter in own if parameter in of))
            if needed:
                self._waiting.append(module.register_forward_pre_hook(functools.partial(_wait, needed), prepend=True))

    def _pass_by(self) -> None:
        """DeepSpeed's hooks around modules do not run."""
        offload = self.optimizer.parameter_offload
        emptied = set()
        for handle in (*offload.forward_hooks, *offload.backward_hooks):
            hooks = handle.hooks_dict_ref()
            if handle.id in hooks:
                if id(hooks) not in emptied:
                    emptied.add(id(hooks))
                    self._hooks.append((hooks, hooks.copy()))
                del hooks[handle.id]

    def _use_torchs_linear(self) -> None:
        """DeepSpeed's, in Python, keeps no view of a weight for the backward pass, which no weight that stays needs."""
        from deepspeed.runtime.zero.linear import zero3_linear_wrap
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

        if functional.linear is zero3_linear_wrap:
            self._linear = zero3_linear_wrap
            functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk

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


class Gathered:
    """Parameters that DeepSpeed has sent for together."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def wait(self) -> None:
        if self._handle is not None:
            self._handle.wait()
            self._handle = None


def _wait(needed: list[Gathered], *_: object) -> None:
    for gathered in needed:
        gathered.wait()
