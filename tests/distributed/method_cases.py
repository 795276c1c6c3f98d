"""The methods other than EraseDiff's default as the processes of a group run them, on the nano denoiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import BATCH, batches, denoiser, process, take_steps, unlearner
from checkpoint_cases import peers

from erasediff import EraseDiff, Fixed, Relabel, Threshold
from erasediff.methods import ESD, Retrain, SalUn, SelectiveAmnesia
from erasediff.methods.salun import keep_to_the_salient
from erasediff.parallel.full_weights import full_weights
from erasediff.parallel.world import World
from erasediff.training.checkpoint import Checkpoint, snapshot_of


def prompts(count: int, seed: int) -> dict[str, torch.Tensor]:
    drawn = torch.randn(count, 3, 32, generator=torch.Generator().manual_seed(seed))
    return {"encoder_hidden_states": drawn.to(World.current().device)}


def salun(given: dict[str, Any]) -> SalUn:
    method = SalUn(**given, barrier=Fixed(2.0), target=Relabel(prompts(2, 7), denoiser().requires_grad_(False).eval()))
    keep_to_the_salient(method, [batches(step, World.current())[1] for step in range(2)], share=0.3)
    return method


def selective_amnesia(given: dict[str, Any]) -> SelectiveAmnesia:
    method = SelectiveAmnesia(**given, ewc_weight=1e6)
    method.estimate_fisher([batch for step in range(2) for batch in batches(step, World.current())])
    return method


def esd(given: dict[str, Any]) -> ESD:
    size = BATCH // World.current().size
    concepts, null = prompts(2, 8), prompts(1, 9)
    return ESD(
        **given,
        teacher=denoiser().requires_grad_(False).eval(),
        concepts=concepts,
        null=null,
        shape=(4, 8, 8),
        batch_size=size,
        num_inference_steps=4,
        latents_from="current",
    )


def threshold(given: dict[str, Any]) -> EraseDiff:
    return EraseDiff(**given, barrier=Threshold(0.1, eta=2.0))


def retrain(given: dict[str, Any]) -> Retrain:
    method = Retrain(**given, seed=5)
    method.draw_weights()
    return method


METHODS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "salun": salun,
    "selective-amnesia": selective_amnesia,
    "esd": esd,
    "retrain": retrain,
    "threshold": threshold,
}


def method_of(name: str, options: dict[str, Any]) -> Any:
    shared = unlearner(optimizer="ConstrainedSGD", **options)
    return METHODS[name]({"model": shared.model, "process": process(), "gradients": shared.gradients})


def train_all(steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Reports of ``steps`` steps of each method and, on the first process, the weights after them."""
    found = {}
    for name in METHODS:
        method = method_of(name, options)
        found[name] = {"reports": take_steps(method, range(steps)), "weights": dict(full_weights(method.model))}
    return found


def go_on(run: str, name: str, first: int, last: int, options: dict[str, Any]) -> list[dict[str, float]]:
    """The reports of steps ``first`` to ``last`` of a method, from one checkpoint of ``run`` to the next."""
    peers()
    method = method_of(name, options)
    snapshot = snapshot_of(method, method.model, shared=options["layout"] != "local")
    if first:
        snapshot.restore(Checkpoint(first, Path(run, f"checkpoint-{first}")))
    reports = take_steps(method, range(first, last))
    snapshot.save(Checkpoint(last, Path(run, f"checkpoint-{last}")))
    return reports
