"""Gradient stores of replicated parameters: one process and DDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from erasediff.parallel.gradient_store import Shard, combine_
from erasediff.parallel.optimizer_state import Counters, masked_gram, set_masks
from erasediff.parallel.recovery import agree_to_retry
from erasediff.parallel.unwrap import named
from erasediff.parallel.world import World
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD, Constraint


class LocalGradientStore:
    """``GradientStore`` of the parameters that ``optimizer`` updates, all of them in this process.

    ``ConstrainedAdamW`` and ``ConstrainedSGD`` read both gradients in one pass. For any other optimizer the combination
    is formed in the retain gradients' own storage; a non-finite step is then skipped on the device where the optimizer
    can (``fused=True``), and by reading one flag on the host where it cannot.

    Raises ``ValueError`` for an optimizer without parameters that require a gradient, or with some that are not
    ``model``'s.
    """

    max_grad_norm: float | None = None
    accumulation_steps: int | None = None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.world = World() if world is None else world
        members: list[tuple[int, nn.Parameter]] = [
            (index, parameter)
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        self.parameters = [parameter for _, parameter in members]
        if not self.parameters:
            raise ValueError("the optimizer holds no parameter that requires a gradient")
        self.names = list(named(model, self.parameters))
        self.counters = Counters(optimizer, members)
        self.device = next(model.parameters()).device
        self._is_open = False

    @property
    def replicated(self) -> bool:
        return True

    @property
    def replicas(self) -> int:
        return self.world.size

    def no_reshard(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            yield

    def begin(self, calls: int) -> None:
        if self._is_open:
            self._recover()
        self._is_open = True
        for parameter in self.parameters:
            parameter.grad = None

    def _recover(self) -> None:
        """Drop what a gradient that was begun and never popped has left, beyond ``Parameter.grad``."""

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def pop_grads(self) -> list[Tensor]:
        taken = []
        for parameter in self.parameters:
            # A parameter that this loss does not reach has gradient zero.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            taken.append(self._here(gradient))
            parameter.grad = None
        self._is_open = False
        return taken

    def release(self, gradients: list[Tensor]) -> None:
        pass

    def gram(self, retain: list[Tensor], forget: list[Tensor]) -> Tensor:
        return masked_gram(self.optimizer, self.parameters, retain, forget)

    def set_masks(self, masks: list[Tensor]) -> None:
        members = [(parameter, self._here(parameter.detach())) for parameter in self.parameters]
        set_masks(self.optimizer, members, masks)

    def update(self, retain: list[Tensor], forget: list[Tensor], constraint: Constraint) -> None:
        if isinstance(self.optimizer, (ConstrainedAdamW, ConstrainedSGD)):
            self.optimizer.constrained_step(retain, forget, constraint)
            return
        combine_(retain, forget, constraint)
        for parameter, delta in zip(self.parameters, retain, strict=True):
            parameter.grad = self._as_gradient(delta, parameter)
        _step_unless_non_finite(self.optimizer, constraint.finite)
        for parameter in self.parameters:
            parameter.grad = None

    def weights(self) -> list[Tensor]:
        self._initialize_state()
        states = (self.optimizer.state[parameter] for parameter in self.parameters)
        return [
            self._here(state.get("master", parameter.detach()))
            for parameter, state in zip(self.parameters, states, strict=True)
        ]

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter in self.parameters:
            master = self.optimizer.state[parameter].get("master")
            if master is not None:
                parameter.copy_(master)

    def shards(self, **aligned: list[Tensor]) -> Iterator[Shard]:
        for index, (name, weight) in enumerate(zip(self.names, self.weights(), strict=True)):
            parameter = self.parameters[index]
            tensors = {"weight": weight}
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and key not in ("master", "mask"):
                    tensors[key] = self._here(value)
            tensors.update((key, values[index]) for key, values in aligned.items())
            flat = {key: value.view(-1) if value.is_contiguous() else value for key, value in tensors.items()}
            yield Shard(name, self._start(parameter), flat)

    def scalars(self) -> dict[str, Tensor]:
        return self.counters.values()

    def load_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        self.counters.load(scalars)

    def _initialize_state(self) -> None:
        if isinstance(self.optimizer, (ConstrainedAdamW, ConstrainedSGD)):
            self.optimizer.initialize_state()

    def _here(self, tensor: Tensor) -> Tensor:
        """This process's part of a parameter, or of something of its shape."""
        return tensor

    def _as_gradient(self, delta: Tensor, parameter: nn.Parameter) -> Tensor:
        """What ``parameter.grad`` should be for this process's ``delta``."""
        return delta

    def _start(self, parameter: nn.Parameter) -> int:
        """Where this process's elements begin in the flattened ``parameter``."""
        return 0


def _step_unless_non_finite(optimizer: Any, finite: Tensor) -> None:
    if all(group.get("fused") for group in optimizer.param_groups):
        # The contract between GradScaler and fused optimizers.
        optimizer.grad_scale = None
        optimizer.found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    elif bool(finite):
        optimizer.step()


class DataParallelGradientStore(LocalGradientStore):
    """``GradientStore`` of a model in DDP. Every backward pass but the last of a gradient stays in its process."""

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer, World.current())
        self._ddp = model
        self._calls_left = 1

    def begin(self, calls: int) -> None:
        super().begin(calls)
        self._calls_left = calls
        # What DDP.no_sync sets; a context manager would have to span the model's forward passes.
        self._ddp.require_backward_grad_sync = calls == 1

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self._calls_left -= 1
        self._ddp.require_backward_grad_sync = self._calls_left <= 1

    def _recover(self) -> None:
        agree_to_retry(self.world)
        # A reduction that did not end is an error of DDP's in the next forward pass.
        self._ddp.reducer._reset_state()

    def pop_grads(self) -> list[Tensor]:
        taken = super().pop_grads()
        # The next backward pass writes to DDP's buckets, which these are views of.
        return [gradient.clone() for gradient in taken] if self._ddp.gradient_as_bucket_view else taken
