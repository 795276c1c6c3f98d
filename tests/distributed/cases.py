"""What the processes of a group do in the tests of gradients: unlearning with the nano Stable Diffusion's denoiser."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from harness import load
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from erasediff import Cosine, EraseDiff, Fixed, Gap, InnerSolve, Norm, Process, Relabel
from erasediff.distributed import World
from erasediff.gradients import averaged_weights, full_weights
from erasediff_kernels import ConstrainedAdamW

BATCH = 12
BARRIERS = {"norm": Norm(0.5), "gap": Gap(5.0), "fixed": Fixed(1.0), "cosine": Cosine(0.5)}
nano = load(Path(__file__).parents[1] / "nano.py")


def denoiser() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nano._unet(32)


def batches(step: int, world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This process's part of a retained and a forgotten batch of latents, with the encodings of their prompts."""
    found = []
    for stream in range(2):
        generator = torch.Generator().manual_seed(1000 * step + stream)
        batch = {
            "sample": torch.randn(BATCH, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(BATCH, 3, 32, generator=generator),
            "sample_ids": torch.arange(BATCH),
        }
        each = BATCH // world.size
        found.append({name: value[world.rank * each : (world.rank + 1) * each] for name, value in batch.items()})
    return found[0], found[1]


def deepspeed_config(stage: int, *, accumulation: int = 1, **own: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, **own.pop("zero", {})}
    return {
        "train_micro_batch_size_per_gpu": BATCH // World.current().size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **own,
    }


OFFLOAD_OPTIMIZER = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
OFFLOAD_BOTH = {**OFFLOAD_OPTIMIZER, "offload_param": {"device": "cpu", "pin_memory": False}}


def engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return trained


def unlearner(
    layout: str,
    *,
    barrier: str = "norm",
    accumulation: int = 1,
    offload: str | None = None,
    relabel: bool = False,
    optimizer: str = "ConstrainedAdamW",
    zero: dict[str, Any] | None = None,
    **own: Any,
) -> EraseDiff:
    """An unlearner of a fresh denoiser; ``layout``: local, ddp, fsdp, or zero-0 to zero-3."""
    model = denoiser()
    options: dict[str, Any] = {"barrier": BARRIERS[barrier], "inner": InnerSolve(steps=2, lr=0.5, refresh_every=3)}
    if relabel:
        other = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(7))
        options["target"] = Relabel({"encoder_hidden_states": other}, copy.deepcopy(model))
    if layout == "fsdp":
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            fully_shard(block)
        fully_shard(model)
    # Two groups, as those who decay only matrices have.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    if optimizer == "ConstrainedAdamW":
        trainer: torch.optim.Optimizer = ConstrainedAdamW(groups, lr=1e-3, ema_decay=0.9)
    else:
        trainer = torch.optim.AdamW(groups, lr=1e-3)
    if layout.startswith("zero"):
        settings = {None: {}, "optimizer": OFFLOAD_OPTIMIZER, "both": OFFLOAD_BOTH}[offload]
        config = deepspeed_config(int(layout[-1]), accumulation=accumulation, zero={**settings, **(zero or {})}, **own)
        return EraseDiff(engine(model, trainer, config), process=process(), **options)
    options["accumulation_steps"] = accumulation
    trained = DistributedDataParallel(model, **own) if layout == "ddp" else model
    return EraseDiff(trained, trainer, process=process(), **options)


def process() -> Process:
    return Process.from_scheduler(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))


def train(steps: int, *arguments: Any, **options: Any) -> dict[str, Any]:
    """The reports of ``steps`` steps, and on the first process the weights and their averages after them."""
    method = unlearner(*arguments, **options)
    reports = [
        {name: float(value) for name, value in method.step(*batches(step, method.gradients.world)).scalars().items()}
        for step in range(steps)
    ]
    weights = dict(full_weights(method.model))
    with averaged_weights(method.gradients):
        averages = dict(full_weights(method.model))
    again = dict(full_weights(method.model))
    assert all(weight is None or torch.equal(weight, again[name]) for name, weight in weights.items())
    return {"reports": reports, "weights": weights, "averages": averages}


def train_with(steps: int, options: dict[str, Any]) -> dict[str, Any]:
    return train(steps, **options)
