"""Every name of DeepSpeed that its documentation does not promise, for the versions that they were tried with.

A layout is how an engine keeps what the optimizer updates. Its ``flats`` are the tensors of the optimizer's own groups:
this process's fp32 partitions (ZeRO 1-3), or whole parameters or their fp32 masters (stage 0). Its lists of gradients
have one tensor for each of them.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from erasediff.gradients.scatter import ScatteredParts, ScatteredRanges

HELD = "held for the next pass"
"""Stands among the modules that are at work with a parameter."""
REDUCED_IN_PLACE = 1 << 16
"""Bytes from which a gradient is worth a collective of its own."""
TRIED = ((0, 19), (0, 20))
"""The first version that is known to have these names, and the first that is not."""


class Fragment(NamedTuple):
    """``length`` elements of ``parameter`` from ``start`` on, which lie in ``flats[flat]`` from ``offset`` on."""

    parameter: nn.Parameter
    start: int
    flat: int
    offset: int
    length: int


class Layout(Protocol):
    """How an engine of one stage keeps gradients and weights."""

    flats: list[Tensor]
    groups: list[int]
    """Which of the optimizer's groups each flat belongs to."""

    def renew(self) -> None:
        """Room for a new gradient, where ``take`` handed out what the engine had."""
        ...

    def take(self) -> list[Tensor]: ...

    def put(self, gradients: list[Tensor]) -> None:
        """What the engine's next step finds as its gradients."""
        ...

    def reuse(self, gradients: list[Tensor]) -> None:
        """Nobody needs what ``take`` has returned any more: the next gradient may be written there."""
        ...

    def hold(self, held: bool) -> None:
        """Whether weights that a pass has gathered stay for the next one, and what was taken may not be whole yet."""
        ...

    def fragments(self) -> Iterator[Fragment]: ...

    def refresh(self) -> None:
        """The model's weights from the flats."""
        ...


def is_engine(model: object) -> bool:
    """Whether ``model`` is a DeepSpeed engine; does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


@contextmanager
def autocast(model: object, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast`` that holds within a DeepSpeed engine too, or nothing if ``dtype`` is None.

    On an accelerator an engine turns off what surrounds it, unless its own configuration asks for the same.
    """
    if dtype is None:
        yield
        return
    engine: Any = model if is_engine(model) else None
    if engine is not None:
        engine.torch_autocast_enabled, engine.torch_autocast_dtype = lambda: True, lambda: dtype
    try:
        with torch.autocast(device.type, dtype):
            yield
    finally:
        if engine is not None:
            del engine.torch_autocast_enabled, engine.torch_autocast_dtype


def gathered(*parameters: Tensor) -> AbstractContextManager[object]:
    """Those of ``parameters`` that ZeRO-3 has partitioned are whole within the block, on each process."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut)  # type: ignore[no-any-return]


def partitioner(config: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What cuts one whole parameter as ZeRO-3 under ``config`` does, with the first process's values.

    Every process must call it for the same parameters in the same order; the parameter's own storage is freed.
    """
    import deepspeed

    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, mem_efficient_linear=False)
    return lambda parameter: init._convert_to_zero_parameters([parameter])


def check_engine(engine: Any) -> None:
    """``ValueError`` for a version, or a kind of engine, whose gradients are elsewhere than here."""
    installed = tuple(int(part) for part in version("deepspeed").split(".")[:2])
    if not TRIED[0] <= installed < TRIED[1]:
        raise ValueError(f"DeepSpeed {version('deepspeed')} was never tried here: install deepspeed>=0.19,<0.20")
    zero = engine._config.zero_config
    offload = zero.offload_optimizer
    refused = {
        "float16 with loss scaling: use bf16, which needs none": engine.fp16_enabled()
        or engine.torch_autocast_z0_gradscaler is not None
        or getattr(engine.optimizer, "torch_autocast_gradscaler", None) is not None,
        "pipeline parallelism": engine.pipeline_parallelism,
        "mixtures of experts": engine.has_moe_layers,
        "managed_gradient_accumulation=false": not engine.managed_gradient_accumulation(),
        "DeepCompile": engine.is_deepcompile_enabled(),
        "ZenFlow": bool(engine.zenflow),
        "SuperOffload": engine.super_offload(),
        "a second partition of the weights (zero_hpz_partition_size)": zero.zero_hpz_partition_size > 1,
        "model parallelism": engine.dp_world_size != torch.distributed.get_world_size(),
        "offloading to NVMe: offload to the CPU": "nvme"
        in {str(getattr(part, "device", None)).rpartition(".")[2] for part in (offload, zero.offload_param)},
        "a share of the optimizer offloaded (offload_optimizer.ratio)": offload is not None and offload.ratio != 1.0,
        "no optimizer": engine.optimizer is None,
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"this DeepSpeed engine uses {what}; unlearning does not support that")


def layout_of(engine: Any) -> Layout:
    """The layout of an engine that ``check_engine`` has let pass. ``ValueError`` for an unknown optimizer wrapper."""
    wrapper = type(engine.optimizer).__name__
    if engine.optimizer is engine.basic_optimizer:
        return WholeParameters(engine, engine.basic_optimizer)
    if wrapper == "FP16_UnfusedOptimizer":
        return WholeMasters(engine, engine.optimizer)
    if wrapper == "DeepSpeedZeroOptimizer":
        return PartitionedGradients(engine.optimizer)
    if wrapper == "DeepSpeedZeroOptimizer_Stage3":
        return PartitionedParameters(engine.optimizer)
    if wrapper == "BF16_Optimizer":
        raise ValueError(
            "this DeepSpeed engine keeps gradients in its BF16_Optimizer: use ZeRO stage 2, or stage 1 without "
            '"data_types": {"grad_accum_dtype": "fp32"}'
        )
    raise ValueError(f"this DeepSpeed engine's optimizer is a {wrapper}, which is not known here")


def take_over_clipping(engine: Any) -> float | None:
    """The engine's gradient clipping, which it shall leave to the constrained step from now on; None if it has none."""
    asked = float(engine._config.gradient_clipping)
    engine._config.gradient_clipping = 0.0
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = 0.0
    return asked or None


def tell_norm(engine: Any, norm: Tensor) -> None:
    """What ``engine.get_global_grad_norm`` returns from now on: the engine's own would be the retain gradient's."""
    engine._global_grad_norm = norm


def return_boundary(engine: Any) -> None:
    """The engine counts its accumulation steps itself again, as before ``set_gradient_accumulation_boundary``."""
    engine._is_gradient_accumulation_boundary = None


class WholeParameters:
    """Stage 0 in fp32: gradients of whole parameters in ``grad``, averaged over all processes.

    DeepSpeed copies all gradients into one tensor for that, and back: here they are averaged where they are.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        chosen = [
            (parameter, index)
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        self.parameters = [parameter for parameter, _ in chosen]
        self.groups = [index for _, index in chosen]
        self.flats: list[Tensor] = list(self.parameters)
        self._is_held = False
        self._under_way: list[Callable[[], object]] = []
        if engine.gradient_average:
            engine.buffered_allreduce_fallback = functools.partial(self._average, engine)

    @torch.no_grad()
    def _average(self, engine: Any, grads: None = None, elements_per_buffer: int = 0) -> None:
        processes = torch.distributed.get_world_size()
        if processes == 1:
            return
        gradients = self._gradients()
        torch._foreach_div_(gradients, processes)
        sent = engine.communication_data_type
        in_place: list[Tensor] = []
        others: list[Tensor] = []
        for gradient in gradients:
            is_large = gradient.nbytes >= REDUCED_IN_PLACE and gradient.is_contiguous() and gradient.dtype == sent
            (in_place if is_large else others).append(gradient)
        self._under_way += [torch.distributed.all_reduce(tensor, async_op=True).wait for tensor in in_place]
        if others:
            joined = torch.cat([gradient.reshape(-1).to(sent) for gradient in others])
            work = torch.distributed.all_reduce(joined, async_op=True)
            self._under_way.append(functools.partial(_wait_and_part, work, joined, others))
        if not self._is_held:
            self._wait()

    def _wait(self) -> None:
        for wait in self._under_way:
            wait()
        self._under_way = []

    def renew(self) -> None:
        pass

    def take(self) -> list[Tensor]:
        taken = self._gradients()
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def _gradients(self) -> list[Tensor]:
        """Of all parameters: zeros for those that no loss has reached."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters]

    def put(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def reuse(self, gradients: list[Tensor]) -> None:
        pass

    def hold(self, held: bool) -> None:
        self._is_held = held
        if not held:
            self._wait()

    def fragments(self) -> Iterator[Fragment]:
        for index, parameter in enumerate(self.parameters):
            yield Fragment(parameter, 0, index, 0, parameter.numel())

    def refresh(self) -> None:
        pass


class WholeMasters(WholeParameters):
    """Stage 0 in bf16: as there, with an fp32 master of each parameter in the optimizer's groups."""

    def __init__(self, engine: Any, optimizer: Any) -> None:
        super().__init__(engine, optimizer.optimizer)
        self.parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        assert len(self.parameters) == len(self.flats)

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, master in zip(self.parameters, self.flats, strict=True):
            parameter.copy_(master)


class PartitionedGradients:
    """ZeRO 1 and 2: one fp32 partition for each group, in which parameters lie end to end.

    With the optimizer offloaded, the gradients of a partition are in its ``grad`` after a backward pass.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.groups = list(range(len(self.flats)))
        self._free: list[list[Tensor]] = []
        self._scatter = self._scatter_of()
        self._is_held = False
        if not optimizer.cpu_offload:
            # No pass over the retain gradient for its norm, nor a wait for it: the update skips what is not finite.
            optimizer.compute_grad_norm = optimizer.check_grad_overflow = False

    def _scatter_of(self) -> ScatteredRanges | None:
        """None where what the engine was told of its gradients is more than a mean in one precision."""
        optimizer = self.optimizer
        own = {
            **_more_than_a_mean(optimizer),
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
        return ScatteredRanges(places, ranges, numel, dtype, device, optimizer.dp_process_group)

    def _add(self, parameter: nn.Parameter, group: int) -> None:
        """In the place of DeepSpeed's own reduction, which copies each gradient twice more, once it is averaged."""
        assert self._scatter is not None
        optimizer = self.optimizer
        if optimizer.use_grad_accum_attribute:
            optimizer._fill_param_grad_accum_attribute(parameter)
        gradient = optimizer.get_gradient_for_reduction(parameter)
        # ZeRO-1 adds up whole gradients, and averages their sum. Not ready while a module in tiles has some left.
        is_due = optimizer.partition_gradients or optimizer.is_gradient_accumulation_boundary()
        if is_due and gradient is not None and getattr(parameter, "ds_grad_is_ready", True):
            self._scatter.add(self._indices[id(parameter)], gradient)
            optimizer.clear_grad_attribute(parameter)

    def _end_of_pass(self) -> None:
        self.optimizer._epilogue_ran_this_backward = True

    def renew(self) -> None:
        optimizer = self.optimizer
        # With the optimizer offloaded, the first backward pass overwrites and further ones add.
        optimizer.micro_step_id = -1
        optimizer.zero_grad()
        if optimizer.cpu_offload:
            for flat in self.flats:
                if flat.grad is None:
                    flat.grad = _zeros_on_the_host(flat, pinned=optimizer.cpu_offload_pin_memory)
        if self._scatter is not None:
            dtype = optimizer.gradient_accumulation_dtype
            self._room = self._free.pop() if self._free else [torch.empty_like(f, dtype=dtype) for f in self.flats]
            self._scatter.begin(self._room)
            optimizer.process_gradients = optimizer.reduce_ready_partitions_and_remove_grads = self._add
            optimizer.independent_gradient_partition_epilogue = self._end_of_pass

    def take(self) -> list[Tensor]:
        optimizer = self.optimizer
        if optimizer.cpu_offload:
            optimizer._wait_for_offload_copies()
            taken: list[Tensor] = [flat.grad for flat in self.flats]  # type: ignore[misc]
            for flat in self.flats:
                flat.grad = None
            return taken
        if self._scatter is not None:
            if not optimizer.partition_gradients:
                # Of an earlier micro-batch alone.
                for group in self.groups:
                    for parameter in optimizer.bit16_groups[group]:
                        self._add(parameter, group)
            self._scatter.finish()
            if not self._is_held:
                self._scatter.wait()
            # Whoever uses the engine between steps finds it as it was.
            del optimizer.process_gradients, optimizer.reduce_ready_partitions_and_remove_grads
            del optimizer.independent_gradient_partition_epilogue
            return self._room
        taken = [torch.cat([p.reshape(-1) for p in optimizer.averaged_gradients[index]]) for index in self.groups]
        for index in self.groups:
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None
        return taken

    def put(self, gradients: list[Tensor]) -> None:
        for index, gradient in zip(self.groups, gradients, strict=True):
            if self.optimizer.cpu_offload:
                self.flats[index].grad = gradient
            else:
                self.optimizer.averaged_gradients[index] = [gradient]

    def reuse(self, gradients: list[Tensor]) -> None:
        if gradients and self._scatter is not None:
            self._free.append(gradients)

    def hold(self, held: bool) -> None:
        self._is_held = held
        if not held and self._scatter is not None:
            self._scatter.wait()

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


class PartitionedParameters:
    """ZeRO 3: fp32 partitions of sub-groups, in which this process's parts of parameters lie end to end."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.fp32_partitioned_groups_flat)
        self.groups = [optimizer.sub_group_to_group_id[index] for index in range(len(self.flats))]
        self._is_lent = False
        self._free: list[Tensor] = []
        if not optimizer.offload_optimizer:
            # As under ZeRO 1 and 2; here it is no option.
            optimizer._get_norm_groups = lambda: [torch.zeros(())]
        parameters: list[Any] = [parameter for group in optimizer.fp16_groups for parameter in group]
        self._indices = {parameter.ds_id: index for index, parameter in enumerate(parameters)}
        self._scatter = self._scatter_of(parameters)
        self._is_held = False
        offload = optimizer.parameter_offload
        parameters = list(offload.module.parameters())
        limit = min(offload._max_reuse_distance_in_numel, offload._max_available_parameters_in_numel)
        self._holdable = parameters if sum(parameter.ds_numel for parameter in parameters) <= limit else []
        self._gathering: list[Gathered] = []
        self._waiting: list[RemovableHandle] = []
        self._hooks: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = []
        """What ``_pass_by`` has emptied, and what was there."""

    def _scatter_of(self, parameters: list[Any]) -> ScatteredParts | None:
        """None where what the engine was told of its gradients is more than a mean in one precision."""
        optimizer = self.optimizer
        group = optimizer.dp_process_group
        processes = torch.distributed.get_world_size(group)
        own = {
            **_more_than_a_mean(optimizer),
            "offloaded": bool(optimizer.offload_optimizer),
            "quantized": optimizer.all2all_process_group is not None,
            "orthogonalized": optimizer.use_muon,
            "of several groups": any(optimizer._get_param_partition_group(p) is not group for p in parameters)
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
        return scatter

    def _add(self, parameter: Any) -> None:
        """In the place of DeepSpeed's own reduction, which copies each gradient three times more."""
        assert self._scatter is not None
        # False while a module that is computed in tiles has some left.
        if getattr(parameter, "ds_grad_is_ready", True):
            assert parameter.grad is not None
            self._scatter.add(self._indices[parameter.ds_id], parameter.grad)
            parameter.grad = None

    @property
    def _partitions(self) -> dict[int, Tensor]:
        """Where each parameter's gradient goes, by ``ds_id``: views into ``grad_partitions_flat_buffer``."""
        return self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # type: ignore[no-any-return]

    def renew(self) -> None:
        optimizer = self.optimizer
        # Also makes the first backward pass overwrite where further ones add.
        optimizer.zero_grad()
        if self._is_lent:
            self._is_lent = False
            self._make_room()
        if self._scatter is not None:
            self._scatter.begin([optimizer.grad_partitions_flat_buffer])
            optimizer.reduce_ready_partitions_and_remove_grads = self._add

    def _make_room(self) -> None:
        optimizer = self.optimizer
        if optimizer.offload_optimizer:
            for flat in self.flats:
                flat.grad = _zeros_on_the_host(flat, pinned=optimizer.offload_optimizer_pin_memory)
            return
        buffer = self._free.pop() if self._free else torch.empty_like(optimizer.grad_partitions_flat_buffer)
        if self._scatter is None:
            buffer.zero_()
        optimizer.grad_partitions_flat_buffer = buffer
        offset = 0
        for group in optimizer.fp16_groups:
            for parameter in group:
                length = parameter.partition_numel()
                self._partitions[parameter.ds_id] = buffer.narrow(0, offset, length)
                offset += length

    def take(self) -> list[Tensor]:
        self._is_lent = True
        if self._scatter is not None:
            self._scatter.finish()
            if not self._is_held:
                self._scatter.wait()
            # Whoever uses the engine between steps finds it as it was.
            del self.optimizer.reduce_ready_partitions_and_remove_grads
        if self.optimizer.offload_optimizer:
            return [flat.grad for flat in self.flats]  # type: ignore[misc]
        lengths = [flat.numel() for flat in self.flats]
        return list(self.optimizer.grad_partitions_flat_buffer.split(lengths))

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
        self._is_held = held
        if not held and self._scatter is not None:
            self._scatter.wait()
        for parameter in self._holdable:
            change = parameter.ds_active_sub_modules.add if held else parameter.ds_active_sub_modules.discard
            change(HELD)
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
        for together in _in_buckets(cut, offload._prefetch_bucket_sz):
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


def _more_than_a_mean(optimizer: Any) -> dict[str, bool]:
    """What either of ZeRO's optimizers may have been told of its gradients."""
    return {
        "scaled": optimizer.postscale_gradients and optimizer.gradient_predivide_factor != 1.0,
        "in several precisions": len(optimizer.ipg_buckets) != 1,
        "of sequences in parts": optimizer.sequence_parallel_size != 1,
        "of tensors in parts": optimizer.autoep_folding_tp_group is not None,
    }


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


def _in_buckets(parameters: list[Any], numel: int) -> Iterator[list[Any]]:
    """Up to ``numel`` elements together, if it is more than one parameter."""
    together: list[Any] = []
    size = 0
    for parameter in parameters:
        if together and size + parameter.ds_numel > numel:
            yield together
            together, size = [], 0
        together.append(parameter)
        size += parameter.ds_numel
    if together:
        yield together


@torch.no_grad()
def _wait_and_part(work: torch.distributed.Work, joined: Tensor, gradients: list[Tensor]) -> None:
    work.wait()
    parts = torch.split(joined, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)])


def _zeros_on_the_host(like: Tensor, *, pinned: bool) -> Tensor:
    return torch.zeros_like(like, requires_grad=False, pin_memory=pinned and torch.cuda.is_available())
