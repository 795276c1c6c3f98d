"""The settings of training, unlearning, sampling and judging."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field

from erasediff.config.fields import ClassNumber, Count, Fraction, NonNegative, Positive, Section


class ModelConfig(Section):
    """The diffusion model that ``train`` builds."""

    conditional: bool = True
    block_out_channels: tuple[Count, ...] = (16, 32, 64)
    layers_per_block: Count = 1
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    num_train_timesteps: Count = 1000


class DataConfig(Section):
    """Which images, and how many of them are held out of every training."""

    name: Literal["digits"] = "digits"
    exclude: tuple[ClassNumber, ...] = ()


class TrainConfig(Section):
    """Training of the base model, and of the model retrained without the forgotten classes."""

    steps: Count = 400
    batch_size: Count = 128
    lr: Positive = 2e-3
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction | None = 0.99
    label_dropout: Fraction = 0.1
    min_snr_gamma: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    accumulation_steps: Count = 1


BARRIER_ETAS = {"gap": 0.5, "cosine": 0.5, "fixed": 1.0}
NORM_ETAS = {"relabel": 0.5, "uniform": 0.1, "gaussian": 0.3}
"""Of the barrier "norm", by target."""


class UnlearnConfig(Section):
    """What to forget from which model, the method and its hyper-parameters; the baselines read what applies to them.

    ``retain_target`` is what the model is to predict on retained data: the true noise, or what the original model, the
    teacher, predicts.

    ``moments`` are Adam's: "8-bit" takes 2 bytes per trained weight for both, where "float" takes 8.

    None for ``retain_target``, ``steps``, ``lr``, ``target``, ``eta`` and ``relabel_to`` means what was found to suit
    the kind of model: see ``resolved`` and ``for_text_to_image``. A run's own ``config.yaml`` holds the values that it
    took.

    ``forget``, ``retain`` and ``relabel_to`` are classes of the digits; what a text-to-image model forgets is in
    ``images``, and label dropout is then that of captions.
    """

    model: Path | None = None
    forget: tuple[ClassNumber, ...] = ()
    retain: tuple[ClassNumber, ...] | None = None
    method: Literal[
        "erasediff", "esd", "pruning", "saemnesia", "salun", "selective-amnesia", "retrain", "finetune", "neggrad"
    ] = "erasediff"
    steps: Count | None = None
    batch_size: Count = 64
    lr: Positive | None = None
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction | None = 0.9
    moments: Literal["float", "8-bit"] = "float"
    retain_label_dropout: Fraction = 0.1
    forget_label_dropout: Fraction = 0.0
    min_snr_gamma: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    accumulation_steps: Count = 1
    target: Literal["uniform", "gaussian", "relabel"] | None = None
    relabel_to: tuple[ClassNumber, ...] | None = None
    teacher: Literal["current", "frozen"] = "frozen"
    # YAML reads true as a boolean.
    retain_target: Annotated[
        Literal["true", "teacher"] | None, BeforeValidator(lambda value: "true" if value is True else value)
    ] = None
    barrier: Literal["norm", "gap", "fixed", "cosine"] = "norm"
    eta: Positive | None = None
    inner_steps: Count = 3
    inner_lr: Positive = 1e-3
    inner_refresh_every: Count = 1
    antithetic: bool = False

    def resolved(self, *, conditional: bool, retained: Sequence[int]) -> Self:
        """These settings with each None filled in; ``retained`` are the classes to retain.

        With labels, the first forgotten class is taught to draw the class that follows it: one alternative, because the
        mean over several that the loss settles for is a blur. The null label is left out of it (no label dropout of
        forgotten images): every image is guided away from its prediction, so what that takes on, the others lose. It
        forgets less by that: asked for no class, the digits' model drew the 3 in 10% of its images before, in 4% after,
        and in 0.2% where a tenth of the forgotten images had the null label (``forget_label_dropout``). The others keep
        what the original predicts for them. Without labels there is nothing to relabel; small steps under a
        weak barrier take the forgotten images away before the others suffer.
        """
        target = self.target or ("relabel" if conditional else "gaussian")
        first = self.forget[0] if self.forget else 0
        following = min(retained, key=lambda label: (label < first, label))
        suited = {
            "target": target,
            "relabel_to": (following,) if target == "relabel" else (),
            "retain_target": "teacher" if conditional else "true",
            "eta": 0.03 if self.barrier == "norm" and not conditional else usual_eta(self.barrier, target),
            "steps": 100 if conditional else 200,
            "lr": 2e-4 if conditional else 3e-4,
        }
        if self.method == "retrain":
            # As long as the base model was trained.
            suited |= {"steps": TrainConfig().steps, "lr": TrainConfig().lr}
        return self.model_copy(update={name: value for name, value in suited.items() if getattr(self, name) is None})


def usual_eta(barrier: str, target: str) -> float:
    """What was found to suit a conditional model."""
    return NORM_ETAS[target] if barrier == "norm" else BARRIER_ETAS[barrier]


class SampleConfig(Section):
    """How images are drawn from a model.

    ``guidance_scale`` None is the model's usual one; ``negative_prompt`` is for text-to-image models.
    """

    guidance_scale: NonNegative | None = None
    negative_prompt: str = ""
    num_inference_steps: Count = 10
    batch_size: Count = 256


class EvaluateConfig(Section):
    """How many images the judge sees: per class, and in all from an unconditional model."""

    per_class: Count = 100
    forgotten: Count = 400
    unconditional: Count = 1000


class RunConfig(Section):
    """What a run leaves behind while it goes on."""

    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 20
