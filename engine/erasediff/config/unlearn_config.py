"""Settings of unlearning, and the defaults that were measured for each kind of model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from erasediff.config.fields import ClassReference, Count, CountOrZero, Fraction, NonNegative, Positive, Section
from erasediff.config.method_index import barrier_names, method_index


def _existing_method(name: str) -> str:
    names = [f"'{method}'" for method in method_index()]
    if name not in method_index():
        raise PydanticCustomError("unknown_method", "Input should be {names}", {"names": or_list(names)})
    return name


def or_list(items: Sequence[str]) -> str:
    """Format an enumeration in words, such as "a, b or c"."""
    return " or ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


MethodName = Annotated[str, AfterValidator(_existing_method)]


def _existing_barrier(name: str) -> str:
    if name not in barrier_names():
        names = [f"'{barrier}'" for barrier in barrier_names()]
        raise PydanticCustomError("unknown_barrier", "Input should be {names}", {"names": or_list(names)})
    return name


BarrierName = Annotated[str, AfterValidator(_existing_barrier)]

BARRIER_ETAS = {"gap": 0.5, "cosine": 0.5, "fixed": 1.0}
NORM_ETAS = {"relabel": 0.5, "uniform": 0.1, "gaussian": 0.3}
"""Default eta of the barrier "norm", by target."""


class UnlearnConfig(Section):
    """Unlearning: model, data to forget, method and its hyper-parameters.

    None for ``retain_target``, ``target_space``, ``steps``, ``lr``, ``target``, ``eta`` and ``relabel_to`` means what
    was found to suit the kind of model: see ``resolved`` and ``for_text_to_image``. A run's own ``config.yaml`` holds
    the values that it took.

    Attributes:
        model: Checkpoint to unlearn from.
        forget: Classes to forget, by number or name, of a model without prompts; what a text-to-image model forgets is
            in ``ImagesConfig``.
        retain: Classes to retain, by number or name; None for all others.
        method: Name of a method, see ``erasediff unlearn --help``. A method reads what applies to it.
        steps: Optimizer steps; of one round, where the run goes on until it has forgotten.
        until: "steps": the run ends after ``steps``. "forgotten": after each ``steps``, a quick form of the verdict
            looks at what the network draws; where that is still recognised, another round follows, at twice the
            learning rate. None: "forgotten" where no number of steps is given and a caption or class is to be
            forgotten.
        max_steps: Steps of all rounds at most; None for those of four rounds.
        max_minutes: Minutes after which no further round begins.
        batch_size: Samples of the retain batch, and of the forget batch, per step over all ranks and micro-batches.
        lr: Peak learning rate.
        lr_schedule: Learning rate after the warm-up.
        warmup_steps: Steps over which the learning rate rises from 0.
        weight_decay: Decoupled weight decay of AdamW.
        ema_decay: Decay of the average of the weights that is saved; None saves the weights themselves.
        moments: Storage of Adam's moments: "float" takes 8 bytes per trained weight for both, "8-bit" 2.
        retain_label_dropout: Probability that a retained sample has the null label or the empty prompt.
        forget_label_dropout: Probability that a forgotten sample has the null label or the empty prompt.
        min_snr_gamma: Gamma of Min-SNR weighting (Hang et al. 2023); None weights all timesteps alike.
        max_grad_norm: Norm that the combined gradient is clipped to; None for no clipping.
        accumulation_steps: Micro-batches per step.
        target: Prediction that forgotten samples are driven to: uniform or Gaussian noise (EraseDiff, eq. 5), or the
            prediction for another class or prompt.
        relabel_to: Classes, by number or name, that the target "relabel" takes predictions of.
        teacher: Model whose prediction the target "relabel" takes: the current one, or a frozen copy of the original.
        retain_target: Prediction wanted on retained samples: the true noise, or the original model's ("teacher").
        target_space: Space of the targets uniform and gaussian: "noise" compares the noise that a prediction of any
            type implies, as published, "prediction" the raw prediction.
        barrier: Rule that combines the two gradients, see ``erasediff.methods.barriers``.
        eta: Strength of the barrier, by its rule.
        level: Level of the forget loss that the barrier "threshold" holds the model to.
        inner_steps: Steps of the inner solve that the barrier "gap" measures the forget loss against.
        inner_lr: Learning rate of the inner solve.
        inner_refresh_every: Steps between inner solves.
        antithetic: Draw the timesteps of a batch in pairs t, T-1-t.
    """

    model: Path | None = None
    forget: tuple[ClassReference, ...] = ()
    retain: tuple[ClassReference, ...] | None = None
    method: MethodName = "erasediff"
    steps: Count | None = None
    until: Literal["forgotten", "steps"] | None = None
    max_steps: Count | None = None
    max_minutes: Positive | None = None
    batch_size: Count = 64
    lr: Positive | None = None
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: CountOrZero = 0
    weight_decay: NonNegative = 0.0
    ema_decay: Fraction | None = 0.9
    moments: Literal["float", "8-bit"] = "float"
    retain_label_dropout: Fraction = 0.1
    forget_label_dropout: Fraction = 0.0
    min_snr_gamma: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    accumulation_steps: Count = 1
    target: Literal["uniform", "gaussian", "relabel"] | None = None
    relabel_to: tuple[ClassReference, ...] | None = None
    teacher: Literal["current", "frozen"] = "frozen"
    # YAML reads true as a boolean.
    retain_target: Annotated[
        Literal["true", "teacher"] | None, BeforeValidator(lambda value: "true" if value is True else value)
    ] = None
    target_space: Literal["noise", "prediction"] | None = None
    barrier: BarrierName = "norm"
    eta: Positive | None = None
    level: Positive | None = None
    inner_steps: Count = 3
    inner_lr: Positive = 1e-3
    inner_refresh_every: Count = 1
    antithetic: bool = False

    def resolved(
        self,
        *,
        conditional: bool,
        retained: Sequence[int],
        forgotten: Sequence[int] = (),
        method_defaults: Mapping[str, Any] | None = None,
    ) -> Self:
        """Fill in each None, by the method's own defaults where it has some.

        Args:
            conditional: The model has class labels.
            retained: The classes to retain.
            forgotten: The classes of what is forgotten, where ``forget`` does not say.
            method_defaults: See ``MethodSpec.defaults``.

        With labels, the first forgotten class is taught to draw the class that follows it: one alternative, because the
        mean over several that the loss settles for is a blur. The null label is left out of it (no label dropout of
        forgotten images): every image is guided away from its prediction, so what that takes on, the others lose. It
        forgets less by that: asked for no class, the digits' model drew the 3 in 10% of its images before, in 4% after,
        and in 0.2% where a tenth of the forgotten images had the null label (``forget_label_dropout``). The others keep
        what the original predicts for them. Without labels there is nothing to relabel; small steps under a
        weak barrier take the forgotten images away before the others suffer.

        Chosen on 8 x 8 digits, the defaults do on Fashion-MNIST's garments of 28 x 28 pixels what they do on digits
        (``benchmarks/fashion_pixels``): with labels nothing is left and the others stay, without labels the proportions
        of the others shift, and some images become noise. So whether there are labels is all that they depend on.
        """
        target = self.target or ("relabel" if conditional else "gaussian")
        first = next(iter(self.forget or forgotten), 0)
        following = min(retained, key=lambda label: (label < first, label), default=first)
        defaults = {
            "target": target,
            "relabel_to": (following,) if target == "relabel" else (),
            # The recipe without labels was found by comparing raw predictions.
            "target_space": "noise" if conditional or self.target else "prediction",
            "retain_target": "teacher" if conditional else "true",
            "eta": 0.03 if self.barrier == "norm" and not conditional else default_eta(self.barrier, target),
            "steps": 100 if conditional else 200,
            "lr": 2e-4 if conditional else 3e-4,
        }
        defaults |= method_defaults or {}
        return self.model_copy(update={name: value for name, value in defaults.items() if getattr(self, name) is None})


def default_eta(barrier: str, target: str) -> float | None:
    """Default eta of a conditional model; None for the barrier's own default."""
    return NORM_ETAS[target] if barrier == "norm" else BARRIER_ETAS.get(barrier)
