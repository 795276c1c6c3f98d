"""Jobs of the processes in the tests of gradients: unlearning with the nano Stable Diffusion's denoiser."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from harness import load
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from erasediff import Cosine, EraseDiff, Fixed, Gap, InnerSolve, Norm, Process, Relabel
from erasediff.methods.barriers import StepValues
from erasediff.models.lora import add as add_lora
from erasediff.parallel.factory import gradients_for
from erasediff.parallel.full_weights import averaged_weights, full_weights
from erasediff.parallel.world import World
from erasediff.parallel.zero.partition import partitioned_module
from erasediff_kernels import ConstrainedAdamW, ConstrainedSGD

BATCH = 12
BARRIERS = {"norm": Norm(0.5), "gap": Gap(5.0), "fixed": Fixed(1.0), "cosine": Cosine(0.5)}
MOST_SCALARS = 8
"""Losses and Gram values that a step sums over processes at once, at most."""
nano = load(Path(__file__).parents[1] / "nano.py")


def denoiser() -> nn.Module:
    """The same weights on every kind of device, where this process computes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nano._unet(32).to(World.current().device)


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
        mine = slice(world.rank * each, (world.rank + 1) * each)
        found.append({name: value[mine].to(world.device) for name, value in batch.items()})
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
    # Compiled when first used, for minutes where others compile it too; gloo needs no shared memory of DeepSpeed's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return trained


def unlearner(
    layout: str,
    *,
    barrier: str = "norm",
    accumulation: int = 1,
    offload: str | None = None,
    relabel: bool = False,
    lr: float = 1e-4,
    lora: bool = False,
    bf16: bool = False,
    optimizer: str = "ConstrainedAdamW",
    zero: dict[str, Any] | None = None,
    own_reduction: bool = True,
    **own: Any,
) -> EraseDiff:
    """An unlearner of a fresh denoiser; ``layout``: local, ddp, fsdp, or zero-0 to zero-3."""
    model = denoiser()
    if lora:
        names = [name for name, _ in model.named_parameters() if "attn" in name]
        add_lora(model, rank=2, targets=names)
    options: dict[str, Any] = {"barrier": BARRIERS[barrier], "inner": InnerSolve(steps=2, lr=0.02, refresh_every=3)}
    if relabel:
        other = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(7)).to(World.current().device)
        options["target"] = Relabel({"encoder_hidden_states": other}, copy.deepcopy(model).requires_grad_(False).eval())
    if bf16:
        options["autocast"] = torch.bfloat16
        model.to(torch.bfloat16)
    if layout == "fsdp":
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            fully_shard(block)
        fully_shard(model)
    # Two groups, as those who decay only matrices have.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1 and p.requires_grad], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]},
    ]
    groups = [group for group in groups if group["params"]]
    trainers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "ConstrainedAdamW": lambda: ConstrainedAdamW(
            groups, lr=lr, ema_decay=0.9, master_weights=bf16 and not layout.startswith("zero")
        ),
        "ConstrainedSGD": lambda: ConstrainedSGD(groups, lr=100 * lr, momentum=0.9, ema_decay=0.9),
        "AdamW": lambda: torch.optim.AdamW(groups, lr=lr),
    }
    trainer = trainers[optimizer]()
    if layout.startswith("zero"):
        settings = {None: {}, "optimizer": OFFLOAD_OPTIMIZER, "both": OFFLOAD_BOTH}[offload]
        for name in ("max_grad_norm", "accumulation_steps"):
            if name in own:
                options[name] = own.pop(name)
        if bf16:
            own["bf16"] = {"enabled": True}
        config = deepspeed_config(int(layout[-1]), accumulation=accumulation, zero={**settings, **(zero or {})}, **own)
        trained = engine(model, trainer, config)
        gradients = gradients_for(trained, own_reduction=own_reduction)
        return EraseDiff(trained, process=process(), gradients=gradients, **options)
    options["accumulation_steps"] = accumulation
    if "max_grad_norm" in own:
        options["max_grad_norm"] = own.pop("max_grad_norm")
    trained = DistributedDataParallel(model, **own) if layout == "ddp" else model
    return EraseDiff(trained, trainer, process=process(), **options)


def process() -> Process:
    return Process.from_scheduler(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))


def take_steps(method: EraseDiff, steps: range) -> list[dict[str, float]]:
    world = World.current()
    reports = [method.step(*batches(step, world)) for step in steps]
    return [{name: float(value) for name, value in report.scalars().items()} for report in reports]


def train(steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """The reports of ``steps`` steps, |r| / |g| in each, and on the first process weights and averages after them."""
    method = unlearner(**options)
    grams: list[Tensor] = []
    values = method._values

    def recorded(*arguments: Any, **losses: Tensor | None) -> StepValues:
        result = values(*arguments, **losses)
        grams.append(result.gram)
        return result

    method._values = recorded  # type: ignore[method-assign]
    reports = take_steps(method, range(steps))
    weights = dict(full_weights(method.model))
    with averaged_weights(method.gradients):
        averages = dict(full_weights(method.model))
    again = dict(full_weights(method.model))
    assert all(weight is None or torch.equal(weight, again[name]) for name, weight in weights.items())
    scales = [float((gram[0] / gram[2]).sqrt()) for gram in grams]
    return {"reports": reports, "scales": scales, "weights": weights, "averages": averages}


def state_after(steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Copy of the state of this process after ``steps`` steps, as in a checkpoint."""
    method = unlearner(**options)
    reports = take_steps(method, range(steps))
    shards = [(s.name, s.start, {key: value.clone() for key, value in s.tensors.items()}) for s in method.shards()]
    return {
        "reports": reports,
        "shards": shards,
        "scalars": {name: value.clone() for name, value in method.scalars().items()},
        "replicated": method.gradients.replicated,
    }


def resumed(
    whole: dict[str, dict[str, Tensor]], scalars: dict[str, Tensor], steps: range, options: dict[str, Any]
) -> Any:
    """The reports of ``steps`` from a state of whole parameters, flat; and the weights after them."""
    method = unlearner(**options)
    with torch.no_grad():
        for name, start, tensors in method.shards():
            for key, value in tensors.items():
                value.copy_(whole[name][key][start : start + value.numel()].view_as(value))
    method.load_scalars(scalars)
    return {"reports": take_steps(method, steps), "weights": dict(full_weights(method.model))}


def steps_with_one_poisoned(options: dict[str, Any], poisoned: str) -> dict[str, Any]:
    """Three steps, in the second of which one sample of the last process's batch is NaN."""
    method = unlearner(**options)
    world = World.current()
    kept, reports = [], []
    for step in range(3):
        retain, forget = batches(step, world)
        if step == 1 and world.rank == world.size - 1:
            (retain if poisoned == "retain" else forget)["sample"][0, 0, 0, 0] = float("nan")
        report = method.step(retain, forget)
        reports.append((bool(report.finite), int(report.skipped)))
        kept.append({name: weight for name, weight in full_weights(method.model) if weight is not None})
    same = all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    moved = any(not torch.equal(kept[1][name], kept[2][name]) for name in kept[0])
    return {"reports": reports, "same": same, "moved": moved, "scalars": method.scalars()}


def refusal(options: dict[str, Any]) -> str:
    """The sentence of the ``ValueError`` with which an unlearner is refused."""
    try:
        unlearner(**options)
    except ValueError as error:
        return str(error)
    return "not refused"


def masters(options: dict[str, Any]) -> dict[str, Any]:
    """The reports of steps too small for bf16, and how many elements moved in the masters and in the weights."""
    method = unlearner(**options)
    before = {name: weight for name, weight in full_weights(method.model) if weight is not None}
    own = [(s.name, s.start, s.tensors["weight"].clone()) for s in method.shards()]
    reports = take_steps(method, range(3))
    moved = sum(int((old != s.tensors["weight"]).sum()) for (_, _, old), s in zip(own, method.shards(), strict=True))
    after = dict(full_weights(method.model))
    rounded = [(s.name, s.start, s.tensors["weight"].bfloat16()) for s in method.shards()]
    return {
        "reports": reports,
        "dtypes": {s.tensors["weight"].dtype for s in method.shards()},
        "moved": moved,
        "weights_moved": sum(int((weight != after[name]).sum()) for name, weight in before.items()),
        "weights": after,
        "rounded": rounded,
    }


def norm_told_by_the_engine(options: dict[str, Any]) -> tuple[float, float]:
    method = unlearner(**options)
    report = method.step(*batches(0, World.current()))
    return float(method.model.get_global_grad_norm()), float(report.grad_norm)


def loaded_in_parts() -> dict[str, Any]:
    """The reports of a denoiser that was partitioned as it was made, and how much of it this process ever held."""
    weights = {name: weight.cpu() for name, weight in denoiser().state_dict().items()}
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return weights[name]

    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = deepspeed_config(3, zero={"stage3_param_persistence_threshold": 0})
    model = partitioned_module(lambda: nano._unet(32), read, config)
    held = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    optimizer = ConstrainedAdamW(model.parameters(), lr=1e-4)
    method = EraseDiff(engine(model, optimizer, config), process=process(), barrier=BARRIERS["norm"])
    # To the end on every process, whatever is found: gathering is collective.
    differing = [name for name, w in full_weights(method.model) if w is not None and not torch.equal(w, weights[name])]
    total = sum(weight.numel() for weight in weights.values())
    return {
        "held": held,
        "share": kept / total,
        "asked": len(asked),
        "same": not differing,
        "reports": take_steps(method, range(3)),
    }


def fine_tuned_between(options: dict[str, Any]) -> dict[str, Tensor]:
    """Weights after a step, one of the user's own loop with the same engine or optimizer, and a step again."""
    method = unlearner(**options)
    world = World.current()
    take_steps(method, range(1))
    batch, _ = batches(7, world)
    timesteps = torch.arange(len(batch["sample"]), device=world.device) * 50
    prediction = method.model(batch["sample"], timesteps, batch["encoder_hidden_states"], return_dict=False)[0]
    loss = prediction.square().mean()
    if options["layout"].startswith("zero"):
        method.gradients.engine.backward(loss)
        method.gradients.engine.step()
    else:
        loss.backward()
        # As the engine's configuration says for the user's own steps.
        nn.utils.clip_grad_norm_(method.model.parameters(), 1.0)
        method.optimizer.step()
        method.optimizer.zero_grad()
    take_steps(method, range(2, 3))
    return dict(full_weights(method.model))


def precision_within_the_engine(layout: str) -> tuple[list[torch.dtype], bool]:
    """dtypes that a linear layer of fp32 weights returned in a step under autocast, while torch says that autocast is
    on for GPUs too, as it is where there are some; and whether the engine then does as its configuration says again.
    """
    method = unlearner(layout)
    method.objective = dataclasses.replace(
        method.objective, autocast=partial(method.gradients.autocast, torch.bfloat16)
    )
    layer = method.gradients.engine.module.time_embedding.linear_1
    found: list[torch.dtype] = []
    layer.register_forward_hook(lambda _module, _inputs, output: found.append(output.dtype))
    torch.set_autocast_enabled("cuda", True)
    try:
        take_steps(method, range(1))
    finally:
        torch.set_autocast_enabled("cuda", False)
    return found, method.gradients.engine.torch_autocast_enabled()
