"""What a checkpoint takes from a run and gives back to it: whole on one process, in fragments where ranks share it."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn

from erasediff.distributed import Peers
from erasediff.methods import Method
from erasediff.runs.checkpoint import Checkpoint
from erasediff.runs.fragments import Sharded, taken_apart


class Snapshot(Protocol):
    """The state of a run; every rank has one."""

    def save(self, checkpoint: Checkpoint) -> None: ...

    def restore(self, checkpoint: Checkpoint) -> None: ...


class WholeSnapshot:
    """Of one process. Reads checkpoints of any number of ranks."""

    def __init__(self, method: Method, model: nn.Module) -> None:
        self.method = method
        self.model = model

    def save(self, checkpoint: Checkpoint) -> None:
        frozen = _frozen(self.model)
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        checkpoint.save(
            {
                "model": weights,
                # In the order of the optimizer's state.
                "parameters": list(getattr(getattr(self.method, "gradients", None), "names", ())),
                "method": {"name": self.method.name, "state": self.method.state_dict()},
                "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            }
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        if not checkpoint.is_whole:
            with checkpoint.fragments(Peers.current()) as fragments:
                fragments.restore(cast(Sharded, self.method))
            return
        state = checkpoint.load(next(self.model.parameters()).device)
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        if unexpected or not _frozen(self.model).issuperset(missing):
            raise ValueError(f"the checkpoint is of another model: {[*unexpected, *missing][:3]}")
        self.method.load_state_dict(state["method"]["state"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([generator.cpu() for generator in state["random"]["cuda"]])


class SharedSnapshot:
    """Of the ranks together: each writes and reads its part. Random states return where the ranks are as many again."""

    def __init__(self, method: Method, peers: Peers, *, replicated: bool, device: torch.device) -> None:
        self.method = cast(Sharded, method)
        self.name = method.name
        self.peers = peers
        self.replicated = replicated
        self.device = device

    def save(self, checkpoint: Checkpoint) -> None:
        state = taken_apart(self.method, with_shards=self.peers.is_main or not self.replicated)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save_shared({**state, "method": self.name, "random": random}, self.peers)

    def restore(self, checkpoint: Checkpoint) -> None:
        with checkpoint.fragments(self.peers) as fragments:
            fragments.restore(self.method)
        random = checkpoint.random_state(self.peers)
        if random is not None:
            torch.set_rng_state(random["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(random["cuda"], self.device)


def snapshot_of(method: Method, model: nn.Module, *, shared: bool) -> Snapshot:
    """``model`` is what the method trains, as it was before anything was put around it."""
    if not shared:
        return WholeSnapshot(method, model)
    gradients = cast(Any, method).gradients
    return SharedSnapshot(method, Peers.current(), replicated=gradients.replicated, device=gradients.device)


def _frozen(model: nn.Module) -> set[str]:
    """The weights that no step changes: they are where the model was loaded from."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
