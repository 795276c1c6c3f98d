"""Retraining without the forgotten data: the oracle that every other method approximates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from erasediff.errors import UserError
from erasediff.gradients.naming import unwrapped
from erasediff.methods.finetune import FineTune
from erasediff.methods.protocol import Materials, Needs, Recipe


class Retrain(FineTune):
    """Training on the retained data of a network whose weights were drawn anew.

    It never saw the forgotten data, so it is what exact unlearning would end with. It costs a whole training: for
    models that train here.
    """

    name: ClassVar[str] = "retrain"

    @torch.no_grad()
    def draw_weights(self) -> None:
        """A diffusers network's initial weights, the same for the same ``seed``; the global random state is left alone.

        Each process draws all of them and keeps its shard. UserError for a network of which only a part is trained:
        the rest would stay as it was.
        """
        network: Any = unwrapped(self.model)
        if not all(parameter.requires_grad for parameter in network.parameters()):
            raise UserError("Retraining begins with new weights everywhere: train all of them, with --train full.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            fresh = dict(type(network).from_config(network.config).named_parameters())
        for name, start, tensors in self.gradients.shards():
            for key in tensors.keys() & {"weight", "ema"}:
                tensor = tensors[key]
                tensor.copy_(fresh[name].flatten()[start : start + tensor.numel()].view_as(tensor))
        self.gradients.refresh()


def make(materials: Materials) -> Retrain:
    method = Retrain(materials.network, materials.optimizer, process=materials.process, **materials.options)
    method.draw_weights()
    return method


RECIPE = Recipe(name=Retrain.name, make=make, needs=lambda _: Needs(forget=False))
