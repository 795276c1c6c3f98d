"""The configurations of the families whose single files say nothing of their own: SD 1.x, SD 2.x and SDXL.

Keyed as ``original_layout.LAYOUTS``; facts from the configurations published with each model. What is not named here is
diffusers' and transformers' default.
"""

from __future__ import annotations

from typing import Any


def _unet(levels: int, **own: Any) -> dict[str, Any]:
    return {"_class_name": "UNet2DConditionModel", "block_out_channels": [320, 640, 1280, 1280][:levels], **own}


def _vae(**own: Any) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        **own,
    }


def _text(cls: str, width: int, layers: int, heads: int, activation: str, projection: int) -> dict[str, Any]:
    return {
        "architectures": [cls],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


def _scheduler(cls: str, **own: Any) -> dict[str, Any]:
    return {
        "_class_name": cls,
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        **own,
    }


def _index(cls: str, scheduler: str, **text_encoders: str) -> dict[str, Any]:
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in text_encoders]
    return {
        "_class_name": cls,
        "scheduler": ["diffusers", scheduler],
        **{name: ["transformers", encoder] for name, encoder in text_encoders.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


_OPENAI_CLIP = _text("CLIPTextModel", 768, 12, 12, "quick_gelu", 768)

KNOWN_CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "index": {
            **_index("StableDiffusionPipeline", "PNDMScheduler", text_encoder="CLIPTextModel"),
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
        "unet": _unet(4, sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        "vae": _vae(sample_size=512, scaling_factor=0.18215),
        "text_encoder": _OPENAI_CLIP,
        "scheduler": _scheduler("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=False),
    },
    "sd2": {
        "index": {
            **_index("StableDiffusionPipeline", "DDIMScheduler", text_encoder="CLIPTextModel"),
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        },
        "unet": _unet(
            4,
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            upcast_attention=True,
        ),
        "vae": _vae(sample_size=768, scaling_factor=0.18215),
        "text_encoder": _text("CLIPTextModel", 1024, 23, 16, "gelu", 512),
        "scheduler": _scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
    },
    "sdxl": {
        "index": {
            **_index(
                "StableDiffusionXLPipeline",
                "EulerDiscreteScheduler",
                text_encoder="CLIPTextModel",
                text_encoder_2="CLIPTextModelWithProjection",
            ),
            "force_zeros_for_empty_prompt": True,
        },
        "unet": _unet(
            3,
            sample_size=128,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": _vae(sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": _OPENAI_CLIP,
        "text_encoder_2": _text("CLIPTextModelWithProjection", 1280, 32, 20, "gelu", 1280),
        "scheduler": _scheduler("EulerDiscreteScheduler", timestep_spacing="leading"),
    },
}
