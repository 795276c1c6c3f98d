"""Base of the constrained optimizers: groups, state, buckets, and the constrained and the plain step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from erasediff_kernels._buckets import Bucket, BucketCache, bucket_key, local_shards, make_buckets
from erasediff_kernels.ops.constraint_multiplier import Constraint
from erasediff_kernels.reference.moment_codes import BLOCK

HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(kw_only=True, slots=True)
class Pending:
    """Constraint and forget gradients of the steps within `ConstrainedOptimizer.pending`.

    Attributes:
        steps: each group's count of steps before the block, by the group's id.
    """

    forget: Mapping[Tensor, Tensor]
    constraint: Constraint
    steps: dict[int, Tensor]


class ConstrainedOptimizer(torch.optim.Optimizer):
    """Base of `ConstrainedAdamW` and `ConstrainedSGD`; a subclass names its moments and runs its operator."""

    MOMENTS: tuple[str, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if defaults["master_weights"] and defaults["stochastic_rounding"]:
            raise ValueError("master_weights and stochastic_rounding make each other needless; choose one")
        ema_decay = defaults["ema_decay"]
        if ema_decay is not None and not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay is {ema_decay}; it must lie in [0, 1], or be None for no average")
        if defaults["weight_decay"] < 0.0:
            raise ValueError(f"weight_decay is {defaults['weight_decay']}; it cannot be negative")
        if not isinstance(defaults["lr"], Tensor) and defaults["lr"] < 0.0:
            raise ValueError(f"lr is {defaults['lr']}; it cannot be negative")
        self._scalars: dict[Any, tuple[float, Tensor]] = {}
        self._bucket_caches: dict[int, BucketCache] = {}
        self._pending: Pending | None = None
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scalars, self._bucket_caches = {}, {}
        self._pending = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        device = group["params"][0].device if group["params"] else None
        group.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))

    def parameters_in_order(self) -> list[Tensor]:
        """The parameters of all groups, in order, that require a gradient: the order of `constrained_step`'s lists."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @torch.no_grad()
    def constrained_step(self, retain: Sequence[Tensor], forget: Sequence[Tensor], constraint: Constraint) -> None:
        """One update along delta = clip_scale (a retain + b forget); none where `constraint.finite` is False.

        Args:
            retain, forget: gradients, one for each of `parameters_in_order()`, any floating dtype and strides; `forget`
                may be empty.
            constraint: from `constraint_multiplier` (a = 1, b = lambda) or `clip_combination` (any a and b).

        Raises:
            ValueError: for lists that do not match the parameters.
        """
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        count = sum(map(len, groups))
        for name, gradients in (("retain", retain), ("forget", forget)):
            if len(gradients) != count and (gradients or name == "retain"):
                raise ValueError(
                    f"{name} has {len(gradients)} gradients for {count} parameters; give one for each of "
                    "parameters_in_order()"
                )
        # Torch's learning rate schedulers warn of a missing step without it.
        self._opt_called = True
        first = 0
        for group_index, params in enumerate(groups):
            last = first + len(params)
            self._update(group_index, params, retain[first:last], forget[first:last], constraint)
            first = last

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A plain step from `p.grad`, by the same kernel; parameters without a gradient are skipped.

        Args:
            closure: as for any optimizer: reevaluates the model and returns the loss.

        Returns:
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group_index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients = [cast(Tensor, p.grad) for p in params]
            if self._pending is None:
                self._update(group_index, params, gradients, (), self._unconstrained(params[0].device))
                continue
            before = self._pending.steps.setdefault(id(group), group["step"].clone())
            group["step"].copy_(before)
            forget = [self._pending.forget[p] for p in params] if self._pending.forget else []
            self._update(group_index, params, gradients, forget, self._pending.constraint)
        return loss

    @contextmanager
    def pending(self, forget: Mapping[Tensor, Tensor], constraint: Constraint) -> Iterator[None]:
        """Within the block `step()` is constrained, with `p.grad` for the retain gradient of each parameter.

        For engines that put gradients in place and call `step()` themselves, as DeepSpeed's, once for each group or
        part of a group. A group's count of steps advances once, however often that is.

        Args:
            forget: the forget gradient of each parameter that will have a `p.grad`; or empty.
            constraint: as in `constrained_step`.
        """
        self._pending = Pending(forget=forget, constraint=constraint, steps={})
        try:
            yield
        finally:
            self._pending = None

    @torch.no_grad()
    def initialize_state(self) -> None:
        """Make the state that the first step would make, so that it can be loaded into."""
        for group in self.param_groups:
            self._states([p for p in group["params"] if p.requires_grad], group)

    def ema_parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (parameter, its running average) for each parameter that has one; they begin at the first step."""
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if "ema" in self.state[p]:
                yield p, self.state[p]["ema"]

    def set_mask(self, param: Tensor, packed: Tensor | None) -> None:
        """Freeze elements of a parameter: they keep their value and their moments.

        Args:
            param: one of the optimizer's parameters.
            packed: uint8 [ceil(n / 8)] from `pack_mask`, frozen where its bit is 0; None lifts the mask.
        """
        if packed is None:
            self.state[param].pop("mask", None)
        else:
            self.state[param]["mask"] = packed.to(param.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the dtype of each state tensor: fp32 moments, masters, bit masks.

        Args:
            state_dict: from `state_dict` of an optimizer with the same groups.
        """
        super().load_state_dict(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for param_id, p in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(param_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group["step"].to(group["params"][0].device)

    def _states(self, params: Sequence[Tensor], group: dict[str, Any]) -> list[dict[str, Tensor]]:
        """The state of each parameter, made where it is not there yet; a mask may be there first."""
        # In a fixed order, so that equal states are equal files.
        needed = [*self._moments(group), *(["ema"] if group["ema_decay"] is not None else [])]
        needed_by_halves = [*needed, *(["master"] if group["master_weights"] else [])]
        states = []
        for p in params:
            state = cast(dict[str, Tensor], self.state[p])
            is_half = p.dtype in HALF_DTYPES
            for name in needed_by_halves if is_half else needed:
                if name in state:
                    continue
                # Half-precision moments lose small updates; fp32 ones cost less than they save.
                dtype = torch.float32 if is_half else p.dtype
                from_param = name in ("ema", "master")
                state[name] = p.detach().to(dtype, copy=True) if from_param else torch.zeros_like(p, dtype=dtype)
            states.append(state)
        if group["moments"] == "8-bit":
            for p, state in zip(params, states, strict=True):
                add_coded_moments(p, state)
        return states

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of moments that are stored as floats."""
        return self.MOMENTS if group["moments"] == "float" else ()

    def _update(
        self,
        group_index: int,
        params: Sequence[Tensor],
        retain: Sequence[Tensor],
        forget: Sequence[Tensor],
        constraint: Constraint,
    ) -> None:
        group = self.param_groups[group_index]
        buckets = self._buckets(group_index, params, group)
        step: Tensor = group["step"]
        for bucket_index, bucket in enumerate(buckets):
            device, params_here = bucket.device, local_shards(bucket.params)
            rounding_key = None
            if group["stochastic_rounding"] and bucket.dtype in HALF_DTYPES:
                rounding_key = self._rounding_key(group, group_index, bucket_index, device)
            # The operator advances the step that it is given, and the step of a group advances once.
            is_last = bucket_index == len(buckets) - 1
            counted = step if is_last and step.device == device else step.to(device, copy=True)
            self._run(
                group,
                bucket,
                bucket.state("master") if bucket.has_master else params_here,
                bucket.select(retain),
                bucket.select(forget),
                multiplier=constraint.multiplier.to(device),
                clip_scale=constraint.clip_scale.to(device),
                finite=constraint.finite.to(device),
                lr=self._scalar((group_index, "lr", device), group["lr"], device),
                step=counted,
                weight_decay=group["weight_decay"],
                ema=bucket.state("ema") if group["ema_decay"] is not None else (),
                ema_decay=group["ema_decay"] or 0.0,
                copies=params_here if bucket.has_master else (),
                masks=bucket.state("mask") if bucket.has_mask else (),
                rounding_key=rounding_key,
            )
            if is_last and counted is not step:
                # Where DeepSpeed offloads, partitions are on the host but the count is not.
                step.copy_(counted)

    def _buckets(self, group_index: int, params: Sequence[Tensor], group: dict[str, Any]) -> list[Bucket]:
        """Buckets of a group; those of the step before while nothing changed, which spares a look into all tensors."""
        cache = self._bucket_caches.get(group_index)
        if cache is not None and cache.is_valid_for(params, self.state.values(), group):
            return cache.buckets
        states = self._states(params, group)
        buckets = make_buckets(params, states)
        self._bucket_caches[group_index] = BucketCache(
            params=list(params),
            states=states,
            all_states=list(self.state.values()),
            key=bucket_key(params, states, group),
            buckets=buckets,
        )
        return buckets

    def _run(self, group: dict[str, Any], bucket: Bucket, *lists: list[Tensor], **common: Any) -> None:
        """Call the operator; `lists` are what it updates, and the retain and forget gradients."""
        raise NotImplementedError

    def _scalar(self, name: Any, value: float | Tensor, device: torch.device) -> Tensor:
        """`value` as a 0-D tensor on the device, copied there only when it changes."""
        if isinstance(value, Tensor):
            return value.to(device)
        cached = self._scalars.get(name)
        if cached is None:
            tensor = torch.full((), value, dtype=torch.float64, device=device)
        elif cached[0] != value:
            tensor = cached[1].fill_(value)
        else:
            return cached[1]
        self._scalars[name] = (value, tensor)
        return tensor

    def _unconstrained(self, device: torch.device) -> Constraint:
        one, zero = self._scalar((1.0, device), 1.0, device), self._scalar((0.0, device), 0.0, device)
        return Constraint(zero, one, zero, one.bool())

    def _rounding_key(self, group: dict[str, Any], group_index: int, bucket_index: int, device: torch.device) -> Tensor:
        """int64 [2] = (seed, step), the address of the random bits; group and bucket change the seed's upper half."""
        stream = (group_index << 8 | bucket_index) & 0x7FFFFFFF
        seed = (group["seed"] ^ stream << 32) & 0xFFFFFFFFFFFFFFFF
        signed = seed - (1 << 64) if seed >> 63 else seed
        words = torch.full((), signed, dtype=torch.int64, device=device)
        return torch.stack((words, group["step"].to(device=device, dtype=torch.int64)))


def add_coded_moments(p: Tensor, state: dict[str, Tensor]) -> None:
    """Make the 8-bit moments of a parameter that are not there yet."""
    if "exp_avg" in state:
        return
    if hasattr(p, "to_local"):
        raise ValueError(
            "8-bit moments cannot belong to distributed tensors: their blocks would end at other places on another "
            "number of ranks; use moments='float'"
        )
    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        state[name] = torch.zeros_like(p, dtype=dtype)
        state[f"{name}_absmax"] = torch.zeros((p.numel() + BLOCK - 1) // BLOCK, device=p.device)
