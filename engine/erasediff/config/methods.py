"""What only one method reads; every default is the literature's, or says that it is ours."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from erasediff.config.fields import Count, Fraction, NonNegative, Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]


class EsdConfig(Section):
    """Erased Stable Diffusion: see ``methods.esd``.

    eta:                 strength of negative guidance
    convention:          of eta and of the target's base: "paper", e_0 - eta (e_c - e_0), or "repository", the authors'
                         newer code, e_c - eta (e_c - e_0): its eta = 2 is the paper's 1
    erase_from:          a prompt whose prediction is the base in either convention
    start_guidance:      guidance scale of the trajectories that x_t is taken from
    num_inference_steps: steps of a whole trajectory
    latents_from:        whose trajectories: "frozen", as in the newer code, or "current", as in the paper
    """

    eta: NonNegative = 1.0
    convention: Literal["paper", "repository"] = "paper"
    erase_from: str | None = None
    start_guidance: NonNegative = 3.0
    num_inference_steps: Count = 50
    latents_from: Literal["frozen", "current"] = "frozen"


class PruningConfig(Section):
    """Weights that are left out: see ``methods.pruning``. No value of the learned mask is the paper's: it has none.

    variant:         a mask that is learned, or one computed from activations (ConceptPrune: ``methods.held_mask``)
    objective:       whose loss the mask is learned with, or the surviving weights tuned with
    share:           learned: of each layer's weights, how many may be pruned, those that the concept drives most;
                     training-free: of each neuron's, how many are pruned per bin of timesteps at most
    observations:    batches that activations are measured on
    initial_score:   of every weight that may be pruned; it is where its score falls below 0
    sparsity_weight: of the penalty on the pruned share
    lr:              of the scores, where unlearn.lr is not set
    timestep_bins:   training-free: ranges of timesteps with scores of their own
    finetune_steps:  training-free: steps for the surviving weights, after the observations
    mask:            of an earlier pruning: it is held, and the surviving weights are tuned in all steps
    attack_prompts:  for the report on neurons: prompts that are to bring the concept back
    """

    variant: Literal["learned", "training-free"] = "learned"
    objective: Literal["esd", "erasediff"] = "esd"
    share: Share = 0.1
    observations: Count = 16
    initial_score: Positive = 1.0
    sparsity_weight: NonNegative = 0.0
    lr: Positive = 0.1
    timestep_bins: Count = 10
    finetune_steps: Annotated[int, Field(ge=0)] = 0
    mask: Path | None = None
    attack_prompts: tuple[str, ...] = ()

    @property
    def learned(self) -> bool:
        """Whether the masks' scores are what is trained."""
        return self.variant == "learned" and self.mask is None

    def usual(self) -> dict[str, float | int]:
        """Settings of ``unlearn`` that follow: scores are learned at a rate of their own, observations are steps."""
        if self.learned:
            return {"lr": self.lr}
        return {} if self.mask is not None else {"steps": self.observations + self.finetune_steps}


class SalunConfig(Section):
    """SalUn: ``retain_weight`` is its alpha (0.1 in the published Stable Diffusion recipe).

    The ``share`` of the weights whose gradients are largest on as many forgotten ``batches`` moves.
    """

    retain_weight: Positive = 0.1
    share: Share = 0.5
    batches: Count = 8


class SelectiveAmnesiaConfig(Section):
    """Selective Amnesia: ``ewc_weight`` is its lambda; the Fisher information is estimated on ``fisher_batches``."""

    ewc_weight: NonNegative = 50.0
    fisher_batches: Count = 50


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
