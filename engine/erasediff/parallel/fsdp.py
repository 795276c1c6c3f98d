"""FSDP2 gradient store: gradients in the shards of distributed tensors after ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from erasediff.parallel.recovery import agree_to_retry
from erasediff.parallel.replicated import LocalGradientStore
from erasediff.parallel.unwrap import unwrapped
from erasediff.parallel.world import World

MAX_LIVE_PARAMETERS = 1_000_000_000
"""The largest model that stays gathered for a step: DeepSpeed's default for ``stage3_max_live_parameters``."""


class FSDPGradientStore(LocalGradientStore):
    """``GradientStore`` of a model after ``fully_shard``: each process sees and updates its shard of each parameter.

    Every micro-batch reduces its gradients, so that no rank holds a whole one: without (``set_requires_gradient_sync``)
    a step of several micro-batches would communicate less, but hold 4 bytes for each parameter of the model. A model of
    at most ``max_live_parameters`` is gathered once for both passes of a step; a larger one before each forward and
    each backward pass, as ``fully_shard`` was told.

    Raises:
        ValueError: Parameters that are no distributed tensors, that are sharded in another dimension than the first, or
            whose mesh leaves out processes.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, max_live_parameters: int = MAX_LIVE_PARAMETERS
    ) -> None:
        super().__init__(model, optimizer, World.current())
        numel = sum(parameter.numel() for parameter in model.parameters())
        self._keeps_gathered = numel <= max_live_parameters
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if not isinstance(parameter, DTensor):
                raise ValueError(f"{name} is not sharded but others are: apply fully_shard to the whole model")
            if any(placement not in (Shard(0), Replicate()) for placement in parameter.placements):
                raise ValueError(f"{name} is placed as {parameter.placements}: shard in the first dimension")
            if parameter.device_mesh.size() != self.world.size:
                raise ValueError(
                    f"{name} is on {parameter.device_mesh.size()} of {self.world.size} processes: give fully_shard a "
                    "mesh of all"
                )
        first = cast(DTensor, self.parameters[0])
        self._replicas = 1
        for placement, size in zip(first.placements, first.device_mesh.shape, strict=True):
            if placement.is_replicate():
                self._replicas *= size
        # With parameters offloaded, the gradients' device is not the one that computes.
        if first.device_mesh.device_type != "cpu":
            self.device = self.world.device

    @property
    def replicated(self) -> bool:
        return self._replicas == self.world.size

    @property
    def replicas(self) -> int:
        return self._replicas

    @contextmanager
    def no_reshard(self) -> Iterator[None]:
        groups = param_groups(self.model) if self._keeps_gathered else []
        before = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
        try:
            for group in groups:
                # What set_reshard_after_forward and set_reshard_after_backward set, which nobody could ask for.
                group.post_forward_mesh_info, group.reshard_after_backward = None, False
            yield
        finally:
            for group, (mesh_info, reshards) in zip(groups, before, strict=True):
                group.post_forward_mesh_info, group.reshard_after_backward = mesh_info, reshards
            for module in self.model.modules() if groups else ():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _recover(self) -> None:
        agree_to_retry(self.world)
        reset_after_failure(self.model)

    def refresh(self) -> None:
        super().refresh()
        if self._is_open:
            # After a failure modules do not reshard; whether all ranks failed is asked when the next gradient begins.
            reset_after_failure(self.model)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass without a backward leaves the root's weights gathered, and now out of date.
                module.reshard()

    def _here(self, tensor: Tensor) -> Tensor:
        return cast(DTensor, tensor).to_local()

    def _as_gradient(self, delta: Tensor, parameter: nn.Parameter) -> Tensor:
        whole = cast(DTensor, parameter)
        return DTensor.from_local(
            delta, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _start(self, parameter: nn.Parameter) -> int:
        whole = cast(DTensor, parameter)
        row = 0
        length = whole.shape[0] if whole.ndim else 1
        for dimension, placement in enumerate(whole.placements):
            if placement.is_shard():
                size = whole.device_mesh.size(dimension)
                chunk = -(-length // size)
                first = min(chunk * whole.device_mesh.get_local_rank(dimension), length)
                row, length = row + first, min(chunk, length - first)
        return row * (whole[0].numel() if whole.ndim and whole.shape[0] else 1)


def param_groups(model: nn.Module) -> list[Any]:
    """torch's ``FSDPParamGroup`` objects of ``model``, each of which is gathered at once."""
    modules = (module for module in model.modules() if isinstance(module, FSDPModule))
    return [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]


def reset_after_failure(model: nn.Module) -> None:
    """Reshard ``model``, after ``fully_shard``, and forget the forward or backward pass that raised.

    Raises:
        RuntimeError: The installed torch has no ``FSDPModule.reset_iter_state``.
    """
    root: Any = unwrapped(model)
    if not hasattr(root, "reset_iter_state"):
        raise RuntimeError(f"torch {torch.__version__} cannot go on after a failed FSDP2 step: resume in a new process")
    root.reset_iter_state()
    for group in param_groups(root):
        for parameter in group.fsdp_params:
            # Of passes whose gradients were not reduced, which torch keeps.
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
