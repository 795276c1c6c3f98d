"""Retraining without the forgotten data: the oracle that every other method approximates."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from erasediff.errors import UserError
from erasediff.methods.finetune import FineTune
from erasediff.methods.protocol import Materials, Needs, Recipe


class Retrain(FineTune):
    """Training on the retained data of a network whose weights were drawn anew.

    It never saw the forgotten data, so it is what exact unlearning would end with. It costs a whole training: for
    models that train here.
    """

    name: ClassVar[str] = "retrain"


def draw_weights(network: nn.Module, seed: int) -> None:
    """A diffusers network's initial weights, the same for the same ``seed``; the global random state is left alone.

    UserError for a network of which only a part is trained: the rest would stay random.
    """
    if not all(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("Retraining begins with new weights everywhere: train all of them, with --train full.")
    diffusers_network: Any = network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(diffusers_network).from_config(diffusers_network.config)
    network.load_state_dict(fresh.state_dict())


def make(materials: Materials) -> Retrain:
    draw_weights(materials.network, materials.config.seed)
    return Retrain(materials.network, materials.optimizer, process=materials.process, **materials.options)


RECIPE = Recipe(name=Retrain.name, make=make, needs=lambda _: Needs(forget=False))
