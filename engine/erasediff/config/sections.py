"""Sections of the configuration: model, data, training, sampling, evaluation, images, checkpoints and output."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from erasediff.config.fields import (
    Bytes,
    ClassReference,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Positive,
    Section,
    Share,
    Side,
)


class ModelConfig(Section):
    """Architecture and noise schedule of the model that ``train`` builds.

    Attributes:
        conditional: Give the UNet an embedding per class, and one more for the null label.
        block_out_channels: Channels of each level of the UNet.
        layers_per_block: Residual blocks per level.
        prediction_type: Prediction type, as in diffusers' schedulers.
        beta_schedule: Schedule of the betas, as in diffusers' schedulers.
        num_train_timesteps: Number of timesteps of the process.
    """

    conditional: bool = True
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32, 64)
    layers_per_block: Annotated[int, Field(gt=0, le=1024)] = 1
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    num_train_timesteps: Count = 1000


class DataConfig(Section):
    """Data set of models without prompts, unless ``images.data`` names another.

    Attributes:
        name: Data set that comes with the package.
        exclude: Classes, by number or name, that ``train`` leaves out.
    """

    name: Literal["digits"] = "digits"
    exclude: tuple[ClassReference, ...] = ()


class TrainConfig(Section):
    """Training of the base model, and of the model retrained without the forgotten classes.

    Attributes:
        steps: Optimizer steps.
        batch_size: Samples per step, over all ranks and micro-batches.
        lr: Peak learning rate of AdamW.
        lr_schedule: Learning rate after the warm-up.
        warmup_steps: Steps over which the learning rate rises from 0.
        weight_decay: Decoupled weight decay of AdamW.
        ema_decay: Decay of the average of the weights that is saved; None saves the weights themselves.
        label_dropout: Probability that a sample has the null label (Ho & Salimans 2022).
        min_snr_gamma: Gamma of Min-SNR weighting (Hang et al. 2023); None weights all timesteps alike.
        max_grad_norm: Norm that gradients are clipped to; None for no clipping.
        accumulation_steps: Micro-batches per step.
    """

    steps: Count = 400
    batch_size: Count = 128
    lr: Positive = 2e-3
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: CountOrZero = 20
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction | None = 0.99
    label_dropout: Fraction = 0.1
    min_snr_gamma: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    accumulation_steps: Count = 1


class SampleConfig(Section):
    """Sampling of images.

    Attributes:
        guidance_scale: Scale of classifier-free guidance; None is the model's default.
        negative_prompt: Negative prompt for text-to-image models.
        num_inference_steps: Steps of the sampler.
        batch_size: Images per call.
    """

    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    negative_prompt: str = ""
    num_inference_steps: Count = 10
    batch_size: Count = 256


class EvaluateConfig(Section):
    """Number of images that are sampled to evaluate a model.

    Attributes:
        per_class: Images of each retained class.
        forgotten: Images of each forgotten class.
        unconditional: Images in all from an unconditional model.
    """

    per_class: Count = 100
    forgotten: Count = 400
    unconditional: Count = 1000


class RunConfig(Section):
    """Checkpoints and metrics of a run.

    Attributes:
        checkpoint_every: Steps between checkpoints.
        keep_checkpoints: Number of checkpoints that are kept, the latest ones.
        log_every: Steps between lines of metrics.
        look_every: Steps between looks at the retained data's denoising loss, by which a run that destroys what it
            should keep is stopped; 0 for none. A look is a forward pass of 1 to 4 batches: about 3% of a run at most.
        drift_limit: Ratio of that loss to the original model's, beyond which two looks in a row stop the run.
    """

    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 20
    look_every: CountOrZero = 25
    drift_limit: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5


class ImagesConfig(Section):
    """Images to forget and to retain, and their preprocessing; for a text-to-image model, with captions.

    Attributes:
        data: Image folder, Hugging Face data set, webdataset shards (a folder of .tar, or train-{000..012}.tar),
            .parquet or .npz file, or the folder of CIFAR or STL-10. Images that one of ``forget_classes``,
            ``forget_phrases`` and ``forget_files`` selects are forgotten, all others retained.
        forget_classes: Classes to forget, values of ``class_column``.
        class_column: Attribute of an image that holds its class.
        forget_phrases: Words of a caption to forget by.
        forget_files: Text file of the images to forget, one path per line.
        forget_data: Image folder or data set of which every image is forgotten.
        forget_prompts: Prompts to forget by images that the original model draws of them.
        retain_prompts: Prompts to retain by images that the original model draws of them.
        images_per_prompt: Images that are drawn of each prompt.
        after: Folder of an unlearning run that this one follows: its model is unlearned from, and what it and those
            before it were asked to forget is not retained.
        rehearsal_share: Share of the retained samples that rehearse these requests, of text-to-image models: images
            that the model draws of the captions which were forgotten.
        split: Split of a data set that has several.
        caption_column: Column of captions; None for ``text``, ``caption`` or ``prompt``.
        caption_template: Caption of images that have none, such as "a photo of a {class}".
        height: Height of images in pixels; None for the checkpoint's own.
        width: Width of images in pixels; None for the checkpoint's own.
        bucket_step: Images of other shapes come to buckets of about height x width, whose sides are multiples of it;
            "auto" is 64 for models no smaller than that. None crops all images to one size.
        mirror: Flip about half of the images.
        skip_broken: Leave out images that cannot be read, with a warning, in the place of an error.
        encode_batch_size: Images that the VAE encodes at once.
        cache: "needed" reads and encodes the images that the run's steps will see, "all" the whole data set. Images of
            several sizes come in another order if they are not all needed.
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
    after: Path | None = None
    rehearsal_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    split: str = "train"
    caption_column: str | None = None
    caption_template: str | None = None
    height: Side | None = None
    width: Side | None = None
    bucket_step: Count | Literal["auto"] | None = "auto"
    mirror: bool = False
    skip_broken: bool = False
    encode_batch_size: Count = 4
    cache: Literal["needed", "all"] = "needed"


class TextToImageConfig(Section):
    """Loading of a checkpoint, and the selection of its denoiser's weights to train.

    Attributes:
        config: Diffusers folder for a single file of unknown architecture: see ``load_text_to_image``.
        prediction_type: Prediction type of a single file that does not record it.
        lora: A LoRA that is merged into the model first.
        weights: Dtype of the weights in memory; bfloat16 with stochastic rounding is that of precision bf16-true.
        train: A selection of ``models.trainable.select``, or "lora". The default is that of text-to-image models; all
            weights of a model without prompts.
        lora_rank: Rank of the LoRA to train.
        lora_alpha: Alpha of the LoRA to train; None is the rank.
        lora_targets: The selection of layers that the LoRA adapts, by default of a model without prompts its attention.
        saliency: Share of weights, the most salient to what is forgotten, that is trained; None for all.
        saliency_batches: Forgotten batches that saliency is measured on.
        anchor_prompts: Prompts that the target "relabel" maps the forgotten concept to, by default the retained caption
            under which the model denoises the forgotten images best; and those that saemnesia's "move" maps it to, by
            default the nearest of the retained prompts.
        attention: Backend of attention.
        gradient_checkpointing: Recompute activations in the backward pass.
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
    """Format of an unlearned model.

    Attributes:
        layout: A diffusers folder, or one file in the family's original layout.
        dtype: Dtype of the tensors in the file. "stored" is that of each tensor in the source. So is None, unless
            trained weights s as saved miss the change from w_0 to w, by |w - s|^2 > 0.01 |w - w_0|^2: what changed then
            takes the narrowest of bfloat16 and float32 that keeps it.
        max_shard_bytes: Size of a file, beyond which weights are split.
        lora_keys: Naming of the tensors in a LoRA's file.
    """

    layout: Literal["diffusers", "single-file"] = "diffusers"
    dtype: Literal["stored", "float32", "float16", "bfloat16"] | None = None
    max_shard_bytes: Bytes = 10_000_000_000
    lora_keys: Literal["diffusers", "kohya"] = "diffusers"
