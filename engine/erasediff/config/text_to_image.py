"""What only text-to-image models need: captioned images, which weights are trained, and what is written."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from erasediff.config.fields import Count, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]


class ImagesConfig(Section):
    """The captioned images that are forgotten and retained, and how they are brought to the model's size.

    ``data`` and ``forget_data`` are image folders or Hugging Face data sets. Of ``data``, what ``forget_classes``,
    ``forget_phrases`` (words of a caption) or ``forget_files`` (a list of paths) ask for is forgotten, and everything
    else retained; all of ``forget_data`` is forgotten. For ``forget_prompts`` and ``retain_prompts`` the original model
    makes the images, ``images_per_prompt`` of each.

    Sizes are in pixels; without ``height`` and ``width``, the checkpoint's own. Images of other shapes come to buckets
    of about that area in multiples of ``bucket_step`` ("auto": 64, for models no smaller than that), or without one are
    cut to that size. ``mirror`` flips about half of them.
    """

    data: str | None = None
    forget_classes: tuple[str, ...] = ()
    class_column: str = "class"
    forget_phrases: tuple[str, ...] = ()
    forget_files: Path | None = None
    forget_data: str | None = None
    forget_prompts: tuple[str, ...] = ()
    retain_prompts: tuple[str, ...] = ()
    images_per_prompt: Count = 8
    split: str = "train"
    caption_column: str | None = None
    caption_template: str | None = None
    height: Count | None = None
    width: Count | None = None
    bucket_step: Count | Literal["auto"] | None = "auto"
    mirror: bool = False
    skip_broken: bool = False
    encode_batch_size: Count = 4


class TextToImageConfig(Section):
    """How a checkpoint is read, and which of its denoiser's weights are trained.

    config, prediction_type: for a single file that does not tell them; see ``load_text_to_image``
    lora:                    a LoRA that is merged into the model first
    weights:                 their dtype in memory; bfloat16 is rounded stochastically
    train:                   a selection of ``models.selection.select``, or "lora"
    lora_rank, lora_alpha:   of the LoRA to train, on the layers that the selection ``lora_targets`` names
    saliency:                the share of weights, the most salient to what is forgotten, that is trained; None for all
    saliency_batches:        forgotten batches that saliency is measured on
    anchor_prompts:          what the target "relabel" puts in the place of what is forgotten; without any, the retained
                             caption under which the model denoises the forgotten images best; and what saemnesia's
                             "move" makes of it: one of the retained prompts, without any the nearest
    """

    config: Path | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    lora: Path | None = None
    weights: Literal["float32", "bfloat16"] = "float32"
    train: str = "xattn"
    lora_rank: Count = 16
    lora_alpha: Positive | None = None
    lora_targets: str = "xattn"
    saliency: Share | None = None
    saliency_batches: Count = 8
    anchor_prompts: tuple[str, ...] = ()
    attention: Literal["auto", "native", "xformers", "flash"] = "auto"
    gradient_checkpointing: bool = False


class OutputConfig(Section):
    """How an unlearned text-to-image model is written; ``dtype`` None keeps that of each stored tensor."""

    layout: Literal["diffusers", "single-file"] = "diffusers"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_bytes: Count = 10_000_000_000
    lora_keys: Literal["diffusers", "kohya"] = "diffusers"
