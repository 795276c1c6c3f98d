"""Every name of DeepSpeed that its documentation does not promise, for the versions that they were tried with.

A layout is how an engine keeps what the optimizer updates. Its ``flats`` are the tensors of the optimizer's own groups:
this process's fp32 partitions (ZeRO 1-3), or whole parameters or their fp32 masters (stage 0). Its lists of gradients
have one tensor for each of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

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

    def fragments(self) -> Iterator[Fragment]: ...

    def refresh(self) -> None:
        """The model's weights from the flats."""
        ...


def is_engine(model: object) -> bool:
    """Whether ``model`` is a DeepSpeed engine; does not import DeepSpeed."""
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


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
        return WholeParameters(engine.basic_optimizer)
    if wrapper == "FP16_UnfusedOptimizer":
        return WholeMasters(engine.optimizer)
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


def return_boundary(engine: Any) -> None:
    """The engine counts its accumulation steps itself again, as before ``set_gradient_accumulation_boundary``."""
    engine._is_gradient_accumulation_boundary = None


class WholeParameters:
    """Stage 0 in fp32: gradients of whole parameters in ``grad``, averaged over all processes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        chosen = [
            (parameter, index)
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        self.parameters = [parameter for parameter, _ in chosen]
        self.groups = [index for _, index in chosen]
        self.flats: list[Tensor] = list(self.parameters)

    def renew(self) -> None:
        pass

    def take(self) -> list[Tensor]:
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return taken

    def put(self, gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def fragments(self) -> Iterator[Fragment]:
        for index, parameter in enumerate(self.parameters):
            yield Fragment(parameter, 0, index, 0, parameter.numel())

    def refresh(self) -> None:
        pass


class WholeMasters(WholeParameters):
    """Stage 0 in bf16: as there, with an fp32 master of each parameter in the optimizer's groups."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer.optimizer)
        self.parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        assert len(self.parameters) == len(self.flats)

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, master in zip(self.parameters, self.flats, strict=True):
            parameter.copy_(master)


class PartitionedGradients:
    """ZeRO 1 and 2: one fp32 partition for each group, in which parameters lie end to end.

    After a backward pass the gradients of a partition are a list of pieces, or with the optimizer offloaded, in the
    partition's ``grad``.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.flats: list[Tensor] = list(optimizer.single_partition_of_fp32_groups)
        self.groups = list(range(len(self.flats)))

    def renew(self) -> None:
        # With the optimizer offloaded, the first backward pass overwrites and further ones add.
        self.optimizer.micro_step_id = -1
        self.optimizer.zero_grad()
        if self.optimizer.cpu_offload:
            for flat in self.flats:
                if flat.grad is None:
                    flat.grad = _zeros_on_the_host(flat, pinned=self.optimizer.cpu_offload_pin_memory)

    def take(self) -> list[Tensor]:
        optimizer = self.optimizer
        if optimizer.cpu_offload:
            optimizer._wait_for_offload_copies()
            taken: list[Tensor] = [flat.grad for flat in self.flats]  # type: ignore[misc]
            for flat in self.flats:
                flat.grad = None
            return taken
        taken = []
        for index in self.groups:
            pieces = optimizer.averaged_gradients[index]
            whole = getattr(pieces, "flat_partition", None)
            if whole is None:
                whole = torch.cat([piece.reshape(-1) for piece in pieces])
            optimizer.averaged_gradients[index] = None
            optimizer.all_grad_tensors[index] = None
            taken.append(whole)
        return taken

    def put(self, gradients: list[Tensor]) -> None:
        for index, gradient in zip(self.groups, gradients, strict=True):
            if self.optimizer.cpu_offload:
                self.flats[index].grad = gradient
            else:
                self.optimizer.averaged_gradients[index] = [gradient]

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

    @property
    def _partitions(self) -> dict[int, Tensor]:
        """Where each parameter's gradient goes, by ``ds_id``: views into ``grad_partitions_flat_buffer``."""
        return self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # type: ignore[no-any-return]

    def renew(self) -> None:
        optimizer = self.optimizer
        # Also makes the first backward pass overwrite where further ones add.
        optimizer.zero_grad()
        if not self._is_lent:
            return
        self._is_lent = False
        if optimizer.offload_optimizer:
            for flat in self.flats:
                flat.grad = _zeros_on_the_host(flat, pinned=optimizer.offload_optimizer_pin_memory)
            return
        buffer = torch.zeros_like(optimizer.grad_partitions_flat_buffer)
        optimizer.grad_partitions_flat_buffer = buffer
        offset = 0
        for group in optimizer.fp16_groups:
            for parameter in group:
                length = parameter.partition_numel()
                self._partitions[parameter.ds_id] = buffer.narrow(0, offset, length)
                offset += length

    def take(self) -> list[Tensor]:
        self._is_lent = True
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


def _zeros_on_the_host(like: Tensor, *, pinned: bool) -> Tensor:
    return torch.zeros_like(like, requires_grad=False, pin_memory=pinned and torch.cuda.is_available())
