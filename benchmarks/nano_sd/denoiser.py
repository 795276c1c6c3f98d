"""The UNet, trained by the engine itself: a checkpoint with random weights is fine-tuned on a captioned folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fashion import SIZE
from rich.console import Console
from text import WIDTH
from transformers import CLIPTextModel, CLIPTokenizer

from erasediff.config import RunConfig
from erasediff.data import Buckets, CachedBatches, LatentCache, read_images
from erasediff.io.atomic import atomic_directory
from erasediff.methods import FineTune
from erasediff.models.load import load_text_to_image
from erasediff.parallel.full_weights import ema_weights
from erasediff.training.checkpoint import Checkpoint
from erasediff.training.loop import run_steps
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import RunFolder
from erasediff_kernels import ConstrainedAdamW

CHANNELS = (32, 64)
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


def write_untrained(
    path: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, seed: int
) -> None:
    """A complete Stable Diffusion 1.x pipeline but for its size, whose UNet has learned nothing yet."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2 ** (len(vae.config.block_out_channels) - 1),
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
    )
    # The schedule and the sampler's settings of Stable Diffusion 1.x.
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_directory(path) as folder:
        pipeline.save_pretrained(folder)


def train_denoiser(
    untrained: Path,
    images: Path,
    latents: Path,
    run: Path,
    out: Path,
    steps: int,
    seed: int,
    console: Console,
    device: torch.device | str = "cpu",
) -> None:
    """Fine-tune ``untrained`` on the captioned folder ``images`` and save it with averaged weights as ``out``.

    Latents are cached in ``latents``; an interrupted training goes on from its last checkpoint in ``run``.
    """
    model = load_text_to_image(untrained, device=device)
    cached = LatentCache(latents).fill(
        read_images(str(images)), model, Buckets.only(*model.default_size), console, batch_size=100
    )
    model.release_encoders()
    # Averaged over about the last tenth of the training, however long it is.
    optimizer = ConstrainedAdamW(model.denoiser.parameters(), LEARNING_RATE, ema_decay=max(0.0, 1 - 10 / steps))
    method = FineTune(
        model.denoiser,
        optimizer,
        process=model.process,
        denoiser=model.predict,
        min_snr_gamma=MIN_SNR_GAMMA,
        seed=seed,
    )
    rate = LearningRate(LEARNING_RATE, steps, warmup_steps=min(100, steps // 10), shape="cosine")
    run.mkdir(parents=True, exist_ok=True)
    run_steps(
        method,
        model.denoiser,
        RunFolder(run, Checkpoint.newest(run)),
        steps=steps,
        settings=RunConfig(checkpoint_every=500, keep_checkpoints=1),
        retain=CachedBatches(cached, BATCH_SIZE, seed=seed, caption_dropout=CAPTION_DROPOUT, device=device),
        before_step=lambda step: rate.apply(optimizer, step),
        console=console,
        title="Denoiser",
    )
    with ema_weights(optimizer):
        model.save(out)
