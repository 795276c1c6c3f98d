"""Whole checkpoints of every family with random weights, small enough to be made in a second, offline.

Only sizes differ from the real ones: layouts, classes, tokenizers and schedulers are what diffusers loads and saves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIZE = 32
"""Height and width in pixels; a latent is half of it."""
TOKENS = 16
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'!"


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """One token per character."""
    words = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS, pad_token=pad_token)


def t5_tokenizer() -> T5Tokenizer:
    """One token per character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def _clip_config(width: int, activation: str = "quick_gelu") -> CLIPTextConfig:
    tokens = 2 * len(CHARACTERS) + 2
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=4 + len(CHARACTERS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )


def _vae(latent_channels: int = 4, **own: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=SIZE,
        **own,
    )


def _unet(cross_attention_dim: int, **own: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": SIZE // 2,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": cross_attention_dim,
            **own,
        }
    )


NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def sd() -> StableDiffusionPipeline:
    """Nano SD 1.x: OpenAI's text encoder, PNDM, epsilon."""
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(32)),
        tokenizer=clip_tokenizer(),
        unet=_unet(32),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_v_prediction() -> StableDiffusionPipeline:
    """Nano SD 2.x: OpenCLIP's text encoder, linear projections around attention, DDIM, v_prediction."""
    scheduler = DDIMScheduler(**NOISE, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False)
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(32, "gelu")),
        tokenizer=clip_tokenizer("!"),
        unet=_unet(32, use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Its text encoders differ in width, by which diffusers tells them apart in a single file."""
    unet = _unet(
        32 + 48,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 48,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(_clip_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(48, "gelu")),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
    )


def sd3(**own: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=SIZE,
        **own,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(_clip_config(16)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(16, "gelu")),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=_t5(),
        tokenizer_3=t5_tokenizer(),
    )


def sd35() -> StableDiffusion3Pipeline:
    """Nano SD 3.5: queries and keys are normalised, and the first block attends to the image a second time."""
    return sd3(qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(8, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(_clip_config(32)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
    )


def _unet2d(channels: int, size: int, num_class_embeds: int | None = None, **own: Any) -> UNet2DModel:
    return UNet2DModel(
        **{
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            "num_class_embeds": num_class_embeds,
            **own,
        }
    )


def ddpm_class() -> DDPMPipeline:
    """Nano DDPM of 3 x 32 x 32 in three classes and a null label, as of CIFAR."""
    return DDPMPipeline(_unet2d(3, 32, 4), DDPMScheduler(num_train_timesteps=100))


def ddim_class() -> DDIMPipeline:
    """The same in three classes without a null label, with DDIM's scheduler."""
    return DDIMPipeline(_unet2d(3, 32, 3), DDIMScheduler(num_train_timesteps=100, clip_sample=False))


def ddpm_unconditional() -> DDPMPipeline:
    """Nano unconditional DDPM of 1 x 28 x 28, as of MNIST."""
    return DDPMPipeline(_unet2d(1, 28, None), DDPMScheduler(num_train_timesteps=100))


def ddpm_timestep() -> DDPMPipeline:
    """Nano DDPM of 3 x 32 x 32 that embeds labels like timesteps, and predicts a variance too."""
    unet = _unet2d(3, 32, class_embed_type="timestep", out_channels=6)
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100, variance_type="learned_range"))


CLASS_NAMES = {0: "airplane, aeroplane", 1: "bird", 2: "cat", 3: "deer"}


def dit(names: dict[int, str] = CLASS_NAMES) -> DiTPipeline:
    """Nano DiT on 4 x 16 x 16 latents of 3 x 32 x 32, in classes and a null label, with a learned sigma."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIZE // 2,
        num_embeds_ada_norm=len(names),
    )
    scheduler = DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    pipeline = DiTPipeline(transformer, _vae(), scheduler, names)
    # As in the checkpoints of DiT's authors, which diffusers reads it from but does not write.
    pipeline.register_to_config(id2label={str(number): name for number, name in names.items()})
    return pipeline


def ldm() -> LDMPipeline:
    """Nano unconditional LDM on 3 x 16 x 16 latents of 3 x 32 x 32."""
    autoencoder = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=32,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=0.6,
    )
    return LDMPipeline(autoencoder, _unet2d(3, SIZE // 2), DDIMScheduler(num_train_timesteps=100, clip_sample=False))


UNPROMPTED: dict[str, Callable[[], Any]] = {
    "ddpm_class": ddpm_class,
    "ddim_class": ddim_class,
    "ddpm_unconditional": ddpm_unconditional,
    "ddpm_timestep": ddpm_timestep,
    "dit": dit,
    "ldm": ldm,
}
"""Models without prompts: in pixels or in latents, with classes or unconditional."""
NANO: dict[str, Callable[[], Any]] = {
    "sd": sd,
    "sd_v_prediction": sd_v_prediction,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
}
FAMILY_EXAMPLES = list(NANO)
"""Models for the tests of every family with prompts: a new one adds its model to ``NANO`` alone."""
VARIANTS: dict[str, Callable[[], Any]] = {"sd35": sd35}
"""Models of these families whose network has other parts."""


def save(name: str, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A model of this module's tables as a diffusers folder, by diffusers itself; the random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (NANO | VARIANTS | UNPROMPTED)[name]()
    pipeline.save_pretrained(folder, **options)
    return folder
