"""What the method saemnesia reads: each default is SAeUron's or SAEmnesia's, or says that it is ours."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from erasediff.config.fields import Count, Fraction, NonNegative, Positive, Section

Template = Annotated[str, Field(pattern=r"\{\}")]


class SaemnesiaConfig(Section):
    """A sparse autoencoder at one block: see ``erasediff.sae``.

    block:                 whose output is edited; objects' block in Stable Diffusion 1.5 by default
    templates:             what each prompt is put into, at {}; its images take turns
    images_per_prompt:     drawn of each prompt, in ``num_inference_steps`` with ``guidance_scale``
    crossed:               concepts and thresholds are learned under other images' prompts too (``collect_activations``)
    held_out:              drawn of each prompt besides: thresholds are calibrated on them, and detection is measured
    false_positives:       share of other concepts' patches, or images, that a threshold may let through at a timestep
    expansion:             n / d
    epochs, lr:            of the autoencoder; ``supervised_epochs`` and ``supervised_lr`` of the second stage
    batch_size:            patches in a step
    dead_after:            patches after which a latent that was not active counts as dead
    weight, decorrelation, sparsity: of the second stage, as in ``Supervision``: ours, since none is published
    detection, intervention, strength, distance: as in ``ConceptEraser``; "published" is the papers' of the first two.
                           What "move" puts in the place is text_to_image.anchor_prompts, or the nearest concept
    bank:                  patches kept per timestep for "replace"
    eraser:                sampling: the folder of an eraser to attach; unlearning: one whose latents serve again, so
                           that the prompts to forget, which it has to know, are erased besides what it erases
    """

    block: str = "up_blocks.1.attentions.1"
    templates: Annotated[tuple[Template, ...], Field(min_length=1)] = ("{}",)
    images_per_prompt: Count = 80
    crossed: bool = True
    held_out: Count = 20
    false_positives: Fraction = 0.05
    num_inference_steps: Count = 50
    guidance_scale: NonNegative = 9.0
    expansion: Count = 16
    k: Annotated[int, Field(gt=0, le=1024)] = 32
    epochs: Count = 5
    lr: Positive = 4e-4
    supervised_epochs: Count = 5
    supervised_lr: Positive = 5e-6
    batch_size: Count = 4096
    dead_after: Count = 10_000_000
    weight: NonNegative = 10.0
    decorrelation: NonNegative = 0.1
    sparsity: NonNegative = 1e-5
    detection: Literal["published", "patch", "image"] = "image"
    intervention: Literal["published", "steer", "replace", "move"] = "move"
    strength: float = -1.0
    distance: Positive = 1.5
    bank: Count = 256
    eraser: Path | None = None
