"""Sharded workload: a denoiser like Stable Diffusion's, and two ways to take a step with DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from erasediff import EraseDiff, Norm, Process
from erasediff.diffusion import Batch, diffusers_denoiser
from erasediff.parallel.world import World
from erasediff.planning import Network
from erasediff_kernels import ConstrainedAdamW

WIDTHS = {"100M": (128, 256, 512), "15M": (64, 128, 192)}
CROSS_ATTENTION_DIM, TOKENS, LATENT = 256, 77, 16
SD = "SD 1.5"
"""That UNet itself, for GPUs."""
REDUCE_BUCKET_SIZE, PREFETCH_BUCKET_SIZE, PERSISTENCE_THRESHOLD = 4_000_000, 4_000_000, 10_000
SIZES = {
    "overlap_comm": False,
    "reduce_bucket_size": REDUCE_BUCKET_SIZE,
    "stage3_prefetch_bucket_size": PREFETCH_BUCKET_SIZE,
    "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
}
"""Small beside the model, as DeepSpeed's defaults are beside a real one."""
Step = Callable[[], object]


def denoiser(size: str) -> nn.Module:
    with torch.random.fork_rng(), World.current().device:
        torch.manual_seed(0)
        if size == SD:
            return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return UNet2DConditionModel(
            sample_size=LATENT,
            block_out_channels=WIDTHS[size],
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=CROSS_ATTENTION_DIM,
            attention_head_dim=8,
        )


def planned(size: str, *, bf16: bool = False) -> Network:
    module = denoiser(size).to(torch.bfloat16 if bf16 else torch.float32)
    return Network(name=size, module=module, resolution=8 * LATENT)


def batch(size: str, count: int, seed: int) -> dict[str, Tensor]:
    world = World.current()
    generator = torch.Generator().manual_seed(1000 * world.rank + seed)
    latent, width = (64, 768) if size == SD else (LATENT, CROSS_ATTENTION_DIM)
    values = {
        "sample": torch.randn(count, 4, latent, latent, generator=generator),
        "encoder_hidden_states": torch.randn(count, TOKENS, width, generator=generator),
        "sample_ids": torch.arange(count) + count * world.rank,
    }
    return {name: value.to(world.device) for name, value in values.items()}


def deepspeed_config(
    stage: int, micro_batch: int, accumulation: int, *, bf16: bool = False, offload: str | None = None
) -> dict[str, Any]:
    """offload: None, "optimizer", or "both" it and parameters. On GPUs with DeepSpeed's own sizes and overlapping."""
    on_the_host = {"device": "cpu", "pin_memory": False}
    parts = {None: (), "optimizer": ("offload_optimizer",), "both": ("offload_optimizer", "offload_param")}[offload]
    return {
        "bf16": {"enabled": bf16},
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            **({} if World.current().device.type == "cuda" else SIZES),
            **dict.fromkeys(parts, on_the_host),
        },
    }


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def in_bf16(model: nn.Module, noisy_sample: Tensor, timesteps: Tensor, condition: Batch) -> Tensor:
    inputs = {name: value.to(torch.bfloat16) for name, value in condition.items()}
    return diffusers_denoiser(model, noisy_sample.to(torch.bfloat16), timesteps, inputs)


def erasediff(
    size: str, stage: int, per_rank: int, *, bf16: bool = False, offload: str | None = None, autocast: bool = False
) -> Step:
    """Steps over ``per_rank`` samples on each rank, half of them retained and half forgotten.

    autocast: bf16 weights are used with autocast, which computes norms in fp32, and not as ``fine_tuning`` uses them
    """
    model = denoiser(size).to(torch.bfloat16 if bf16 else torch.float32)
    optimizer = ConstrainedAdamW(model.parameters(), lr=1e-5)
    engine = engine_of(model, optimizer, deepspeed_config(stage, per_rank // 2, 1, bf16=bf16, offload=offload))
    precision: dict[str, Any] = {"denoiser": in_bf16} if bf16 and not autocast else {}
    if bf16 and autocast:
        precision["autocast"] = torch.bfloat16
    unlearner = EraseDiff(engine, process=Process.from_scheduler(scheduler()), barrier=Norm(0.1), **precision)
    retain, forget = batch(size, per_rank // 2, 0), batch(size, per_rank // 2, 1)
    return lambda: unlearner.step(retain, forget)


def fine_tuning(size: str, stage: int, per_rank: int, accumulation: int = 1, *, bf16: bool = False) -> Step:
    """The loop that people write with DeepSpeed: torch's noise, loss and fused AdamW, the engine's clipping."""
    device, dtype = World.current().device, torch.bfloat16 if bf16 else torch.float32
    model = denoiser(size).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine = engine_of(model, optimizer, deepspeed_config(stage, per_rank // accumulation, accumulation, bf16=bf16))
    noising = scheduler()
    parts = [batch(size, per_rank // accumulation, index) for index in range(accumulation)]

    def step() -> None:
        for part in parts:
            sample = part["sample"]
            noise = torch.randn_like(sample)
            timesteps = torch.randint(0, noising.config.num_train_timesteps, (len(sample),), device=device)
            noisy = noising.add_noise(sample, noise, timesteps).to(dtype)
            prediction = engine(noisy, timesteps, part["encoder_hidden_states"].to(dtype), return_dict=False)[0]
            engine.backward(functional.mse_loss(prediction.float(), noise))
            engine.step()

    return step
