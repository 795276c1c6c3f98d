"""Weights gathered once for both passes of a step, under ZeRO 3."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from erasediff.parallel.zero.layout import in_buckets

HELD = "held for the next pass"
"""Stands among the modules that are at work with a parameter."""


class HeldWeights:
    """All of the model or none of them: all where both ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``
    are at least as many.

    offload: DeepSpeed's ``parameter_offload``, which gathers parameters around modules
    """

    def __init__(self, offload: Any) -> None:
        self.offload = offload
        parameters = list(offload.module.parameters())
        limit = min(offload._max_reuse_distance_in_numel, offload._max_available_parameters_in_numel)
        self._holdable = parameters if sum(parameter.ds_numel for parameter in parameters) <= limit else []
        self._gathering: list[Gathered] = []
        self._waiting: list[RemovableHandle] = []
        self._hooks: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any], set[int]]] = []
        """Hooks of a module, what they were before ``_disable_hooks``, and the keys of those that it took out."""
        self._linear: Callable[..., Tensor] | None = None
        """What ``torch.nn.functional.linear`` was before ``_use_torchs_linear``."""

    def keep_gathered(self, held: bool) -> None:
        """Until ``held`` is false, what a pass gathers stays: DeepSpeed cuts a parameter only if no module is at work
        with it, and before an update all."""
        for parameter in self._holdable:
            change = parameter.ds_active_sub_modules.add if held else parameter.ds_active_sub_modules.discard
            change(HELD)
        if held:
            self._begin()
        else:
            self._end()

    def _begin(self) -> None:
        if not self._holdable:
            return
        self._use_torchs_linear()
        offload = self.offload
        if offload.zero_quantized_weights or offload.zero_quantized_nontrainable_weights:
            return
        # From the first step on, for the same bits in each: these put functions of autograd around modules, which
        # change the order in which gradients that meet are added up.
        resting = list(offload.backward_hooks)
        can_gather = self._can_gather()
        if can_gather:
            resting += offload.forward_hooks
        self._disable_hooks(resting)
        if can_gather:
            self._gather()

    def _end(self) -> None:
        # What others share comes back first: waiting may raise, where another process is gone.
        if self._linear is not None:
            functional.linear, self._linear = self._linear, None
        for handle in self._waiting:
            handle.remove()
        for hooks, before, disabled in self._hooks:
            # In their order; those that others have removed meanwhile stay away.
            restored = {key: hook for key, hook in before.items() if key in disabled or key in hooks}
            restored |= {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(restored)
        gathering, self._gathering, self._waiting, self._hooks = self._gathering, [], [], []
        for gathered in gathering:
            gathered.wait()

    def _can_gather(self) -> bool:
        """Whether DeepSpeed has seen in which order modules run and whose weights they use, and sends for none now."""
        is_quiet = all(parameter.ds_status.name != "INFLIGHT" for parameter in self._holdable)
        return bool(is_quiet and self.offload.get_param_coordinator().is_complete_trace())

    def _gather(self) -> None:
        """Send for all weights at once; a module waits only for those that it needs.

        DeepSpeed sends for them from its hooks around each module, of which those before and after both passes would
        find out, over and over, that there is nothing to do.
        """
        offload = self.offload
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

    def _disable_hooks(self, handles: Iterable[Any]) -> None:
        """DeepSpeed's hooks around modules, those of ``handles``, do not run."""
        disabled: dict[int, set[int]] = {}
        for handle in handles:
            hooks = handle.hooks_dict_ref()
            if handle.id in hooks:
                if id(hooks) not in disabled:
                    disabled[id(hooks)] = set()
                    self._hooks.append((hooks, hooks.copy(), disabled[id(hooks)]))
                disabled[id(hooks)].add(handle.id)
                del hooks[handle.id]

    def _use_torchs_linear(self) -> None:
        """DeepSpeed's, in Python, keeps no view of a weight for the backward pass, which no weight that stays needs."""
        from deepspeed.runtime.zero.linear import zero3_linear_wrap
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

        if functional.linear is zero3_linear_wrap:
            self._linear = zero3_linear_wrap
            functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk


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
