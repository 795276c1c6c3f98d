"""Memory, collectives and module hooks of a step, for tests that start these in ranks."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from typing import Any
from unittest import mock

from cases import MOST_SCALARS, batches, process, take_steps, unlearner
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erasediff.methods import FineTune
from erasediff.parallel.full_weights import full_weights
from erasediff.parallel.world import World
from erasediff.parallel.zero import stage0 as unsharded


def bytes_at_the_update(options: dict[str, Any], is_constrained: bool) -> tuple[int, int]:
    """(bytes that are there when the optimizer steps, and were not before there was one; of a partition in fp32)."""
    before = bytes_of_tensors()
    method = unlearner(**options)
    if not is_constrained:
        method = FineTune(method.model, process=process())
    world = World.current()
    # An inner solve is begun again with the last step.
    for step in range(3):
        method.step(*batches(step, world))
    counts: list[int] = []
    method.optimizer.register_step_pre_hook(lambda *_: counts.append(bytes_of_tensors()))
    method.step(*batches(3, world))
    partition = sum(shard.tensors["weight"].numel() for shard in method.shards()) * 4
    return counts[0] - before, partition


def bytes_of_tensors() -> int:
    gc.collect()
    storages = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if isinstance(found, Tensor)
    }
    return sum(storages.values())


def gathered_in_a_step(options: dict[str, Any]) -> float:
    """Number of times that a step gathers all weights of the model, once DeepSpeed knows the order of modules."""
    method = unlearner(**options)
    world, total = World.current(), sum(parameter.ds_numel for parameter in method.model.parameters())
    for step in range(3):
        method.step(*batches(step, world))
    with Collectives() as collectives:
        method.step(*batches(3, world))
    return sum(collectives.elements["allgather"]) / total


def collectives_in_a_step(options: dict[str, Any]) -> set[str]:
    method = unlearner(**options)
    method.step(*batches(0, World.current()))
    with Collectives() as collectives:
        method.step(*batches(1, World.current()))
    return set(collectives.elements)


def averaged_by(numel: int, options: dict[str, Any]) -> tuple[list[int], list[dict[str, float]], dict[str, Tensor]]:
    """Three steps in which up to ``numel`` elements are averaged together, if it is more than one gradient: how many
    were each time, the reports, and on the first process the weights.
    """
    method = unlearner(**options)
    with mock.patch.object(unsharded, "BUCKET_NUMEL", numel), Collectives() as collectives:
        reports = take_steps(method, range(3))
    averaged = [elements for elements in collectives.elements["allreduce"] if elements > MOST_SCALARS]
    return averaged, reports, dict(full_weights(method.model))


class Collectives(TorchDispatchMode):
    """``elements``: by kind, of each collective's first tensors; those of a gather are where it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: defaultdict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next((kind for kind in ("allgather", "allreduce") if kind in func.__name__), func.__name__)
            self.elements[kind].append(sum(leaf.numel() for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)))
        return func(*args, **(kwargs or {}))


def hooks_in_a_step(options: dict[str, Any]) -> dict[str, Any]:
    """Calls of modules in the fourth step, counted by a hook of the user's and by DeepSpeed's before each, and
    whether the hooks are as before it.
    """
    method = unlearner(**options)
    offload = method.gradients.engine.optimizer.parameter_offload
    modules = list(offload.module.modules())
    calls: Counter[str] = Counter()
    for module in modules:
        module.register_forward_hook(lambda *_: calls.update(["user"]))
    gathering = offload.pre_sub_module_forward_function

    def noted(module: nn.Module) -> None:
        calls["deepspeed"] += 1
        gathering(module)

    offload.pre_sub_module_forward_function = noted
    world = World.current()
    for step in range(3):
        method.step(*batches(step, world))
    before = [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in modules]
    calls.clear()
    method.step(*batches(3, world))
    after = [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in modules]
    return {"calls": dict(calls), "same": before == after}
