"""What only one method reads; every default is the literature's, or says that it is ours."""

from typing import Annotated, Literal

from pydantic import Field

from erasediff.config.fields import Count, NonNegative, Positive, Section

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
    """A learned mask over weights: see ``methods.pruning``. No value is the paper's: it publishes none.

    objective:       whose loss the mask is learned with
    initial_score:   of every weight; a weight is pruned where its score falls below 0
    sparsity_weight: of the penalty on the pruned share
    lr:              of the scores, where unlearn.lr is not set
    attack_prompts:  for the report on neurons: prompts that are to bring the concept back
    """

    objective: Literal["esd", "erasediff"] = "esd"
    initial_score: Positive = 3.0
    sparsity_weight: NonNegative = 1.0
    lr: Positive = 0.05
    attack_prompts: tuple[str, ...] = ()


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
