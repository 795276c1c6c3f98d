"""Jobs of the processes in the tests of text-to-image runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_cases import peers
from diffusers import UNet2DConditionModel
from torch import nn

import erasediff.parallel.zero.partition as loading
from erasediff.config import load_config
from erasediff.errors import UserError
from erasediff.parallel.full_weights import full_weights
from erasediff.parallel.wrap import parallelize_network
from erasediff.workflows.build_unlearning import build_unlearning_job
from erasediff_kernels import ConstrainedAdamW

SETTINGS = {
    "threads": 1,
    "unlearn.batch_size": 4,
    "unlearn.lr": 1e-3,
    "unlearn.target": "relabel",
    "unlearn.retain_target": "teacher",
    "images.forget_prompts": ["a cat"],
    "images.retain_prompts": ["a dog", "a bird"],
    "images.images_per_prompt": 2,
    "images.height": 32,
    "images.width": 32,
    "images.bucket_step": None,
    "sample.num_inference_steps": 1,
    "text_to_image.anchor_prompts": ["a dog"],
    "text_to_image.train": "full",
}


def bytes_in(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the parameters that have storage of their own, without partitions."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters if not parameter.is_meta)


def denoisers() -> set[nn.Module]:
    """All that are in memory."""
    return {module for module in gc.get_objects() if isinstance(module, UNet2DConditionModel)}


def unlearn(folder: str, cache: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Two steps from the checkpoint in ``folder``, and the most bytes in whole parameters while it was cut."""
    os.environ["ERASEDIFF_CACHE"] = cache
    peers()
    most = 0
    seen: list[nn.Parameter] = []
    partitioner = loading.partitioner
    # The process serves many tests: theirs are not of this run.
    others = denoisers()

    def watched(config: dict[str, Any]) -> Any:
        nonlocal most
        cut = partitioner(config)
        most = max(most, bytes_in({parameter for module in denoisers() - others for parameter in module.parameters()}))

        def watching(parameter: nn.Parameter) -> None:
            nonlocal most
            seen.append(parameter)
            most = max(most, bytes_in(seen))
            cut(parameter)

        return watching

    loading.partitioner = watched
    try:
        session = build_unlearning_job(load_config(None, {**SETTINGS, "unlearn.model": Path(folder), **settings}))
    finally:
        loading.partitioner = partitioner
    sizes = {name: value.numel() * value.element_size() for name, value in _shapes(session.network).items()}
    reports = []
    for step in range(2):
        session.rate.apply(session.optimizer, step)
        report = session.method.step(session.retain.at(step), session.forget.at(step))
        reports.append({name: float(value) for name, value in report.scalars().items()})
    return {
        "reports": reports,
        "most": most,
        "cuts": len(seen),
        "largest": max(sizes.values()),
        "total": sum(sizes.values()),
        "weights": dict(full_weights(session.method.model)),
    }


def _shapes(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
        for name, parameter in network.named_parameters()
    }


def refusals(configurations: list[str]) -> list[str]:
    """Error message for each of these DeepSpeed configurations of the user."""
    peers()
    said = []
    for path in configurations:
        settings = load_config(None, {"distributed.launch": "zero", "distributed.deepspeed_config": path}).distributed
        network = nn.Linear(4, 4)
        try:
            parallelize_network(
                network,
                network.parameters(),
                partial(ConstrainedAdamW, lr=1e-3),
                settings,
                batch_size=dist.get_world_size(),
                accumulation_steps=1,
                max_grad_norm=None,
            )
        except UserError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    return said
