"""Configuration schema: models, data, training, unlearning, sampling, evaluation, parallelism."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from erasediff.config.fields import ClassReference, Count, Fraction, NonNegative, Positive, Section, Share
from erasediff.config.method_index import barrier_names, method_index


class ModelConfig(Section):
    """Architecture and noise schedule of the model that ``train`` builds."""

    conditional: bool = True
    block_out_channels: tuple[Count, ...] = (16, 32, 64)
    layers_per_block: Count = 1
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "squaredcos_cap_v2"
    num_train_timesteps: Count = 1000


class DataConfig(Section):
    """Data set of models without prompts unless ``images.data`` names another, and the classes that ``train`` leaves
    out."""

    name: Literal["digits"] = "digits"
    exclude: tuple[ClassReference, ...] = ()


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
    """Unlearning: model, data to forget, method and hyper-parameters; methods read what applies to them.

    ``retain_target`` is what the model is to predict on retained data: the true noise, or what the original model, the
    teacher, predicts.

    ``moments`` are Adam's: "8-bit" takes 2 bytes per trained weight for both, where "float" takes 8.

    ``target_space`` is that of the targets uniform and gaussian: "noise" compares the noise that a prediction of any
    type implies, as published, "prediction" the raw prediction. ``level`` is that of the forget loss which the barrier
    threshold holds the model to.

    None for ``retain_target``, ``target_space``, ``steps``, ``lr``, ``target``, ``eta`` and ``relabel_to`` means what
    was found to suit the kind of model: see ``resolved`` and ``for_text_to_image``. A run's own ``config.yaml`` holds
    the values that it took.

    ``forget``, ``retain`` and ``relabel_to`` are classes, by number or name, of a model without prompts; what a
    text-to-image model forgets is in ``images``, and label dropout is then that of captions.
    """

    model: Path | None = None
    forget: tuple[ClassReference, ...] = ()
    retain: tuple[ClassReference, ...] | None = None
    method: MethodName = "erasediff"
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
        """
        target = self.target or ("relabel" if conditional else "gaussian")
        first = next(iter(self.forget or forgotten), 0)
        following = min(retained, key=lambda label: (label < first, label), default=first)
        defaults = {
            "target": target,
            "relabel_to": (following,) if target == "relabel" else (),
            # What suits the digits' own recipe was found by comparing raw predictions.
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


class SampleConfig(Section):
    """Sampling of images.

    Attributes:
        guidance_scale: Scale of classifier-free guidance; None is the model's default.
        negative_prompt: Negative prompt for text-to-image models.
        num_inference_steps: Steps of the sampler.
        batch_size: Images per call.
    """

    guidance_scale: NonNegative | None = None
    negative_prompt: str = ""
    num_inference_steps: Count = 10
    batch_size: Count = 256


class EvaluateConfig(Section):
    """Evaluation: numbers of images per class, and in all from an unconditional model."""

    per_class: Count = 100
    forgotten: Count = 400
    unconditional: Count = 1000


class RunConfig(Section):
    """Checkpoints and metrics of a run."""

    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 20


class ImagesConfig(Section):
    """Images to forget and to retain, and their preprocessing.

    ``data`` and ``forget_data`` are image folders, Hugging Face data sets, .npz files, or the folders of CIFAR and
    STL-10; for a text-to-image model, with captions. Of ``data``, what ``forget_classes``,
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
    """Loading of a checkpoint, and the selection of its denoiser's weights to train.

    Attributes:
        config: Diffusers folder for a single file of unknown architecture: see ``load_text_to_image``.
        prediction_type: Prediction type of a single file that does not record it.
        lora: A LoRA that is merged into the model first.
        weights: Dtype of the weights in memory; bfloat16 with stochastic rounding is that of precision bf16-true.
        train: A selection of ``models.trainable.select``, or "lora".
        lora_rank: Rank of the LoRA to train.
        lora_alpha: Alpha of the LoRA to train; None is the rank.
        lora_targets: The selection of layers that the LoRA adapts.
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
    """Format of an unlearned text-to-image model.

    Attributes:
        layout: A diffusers folder, or one file in the family's original layout.
        dtype: Dtype of the tensors in the file; None keeps that of each stored tensor.
        max_shard_bytes: Size of a file, beyond which weights are split.
        lora_keys: Naming of the tensors in a LoRA's file.
    """

    layout: Literal["diffusers", "single-file"] = "diffusers"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    max_shard_bytes: Count = 10_000_000_000
    lora_keys: Literal["diffusers", "kohya"] = "diffusers"


class DistributedConfig(Section):
    """Parallelism: one process per device, each with its slice of every batch; the result is that of one process.

    Attributes:
        launch: "none" is one process; "ddp" replicates the whole state; "fsdp" shards parameters, gradients and
            optimizer state (FSDP2); "zero" is DeepSpeed at ``stage``.
        stage: ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too; None is that of
            ``deepspeed_config``, or 2.
        processes: Number on this machine; if it is not set and there are GPUs, one for each of them. Under torchrun,
            deepspeed or accelerate launch, as many as these started.
        offload_optimizer: Keep the optimizer's state, and take its step, on the CPU.
        offload_params: Keep parameters on the CPU while they are not used (ZeRO 3 and FSDP).
        deepspeed_config: A DeepSpeed configuration file; what it omits or sets to "auto" follows the other settings.
        own_reduction: Reduce gradients and gather weights of ZeRO by erasediff's code, which overlaps and copies less;
            false for DeepSpeed's own.
        timeout: Seconds that ranks wait for one another before the run ends with an error.
    """

    launch: Literal["none", "ddp", "fsdp", "zero"] = "none"
    stage: Literal[0, 1, 2, 3] | None = None
    processes: Count = 1
    offload_optimizer: bool = False
    offload_params: bool = False
    deepspeed_config: Path | None = None
    own_reduction: bool = True
    timeout: Positive = 600.0


SECTION_ALIASES = {"pixel_model": "model", "dataset": "data"}
"""Alternative names of sections in files and ``--set``."""

PRECISION_ALIASES = {"float32": "fp32", "bfloat16": "bf16-mixed"}
"""Earlier names of precisions. Runs still write them, so that caches and stored configurations stay valid."""

Precision = Annotated[
    Literal["fp32", "bf16-mixed", "bf16-true"],
    BeforeValidator(lambda value: PRECISION_ALIASES.get(value, value) if isinstance(value, str) else value),
    PlainSerializer(lambda value: {new: old for old, new in PRECISION_ALIASES.items()}.get(value, value), str),
]

SectionT = TypeVar("SectionT", bound=Section)


class Config(Section):
    """Configuration of all commands.

    Each method's own settings are a further section, which ``erasediff.methods`` registers when it is imported;
    ``load_config`` sees to that.

    ``precision`` is "fp32", "bf16-mixed" (autocast to bfloat16 on float32 weights) or "bf16-true" (bfloat16 weights as
    well, of text-to-image models). ``threads`` are those of a CPU (None: one per core, the default of all but the
    digits, whose convolutions are too small for more than one; sums in another number of threads round differently).
    ``text_to_image`` and ``output`` are for text-to-image models alone.

    A file may call ``model`` ``pixel_model``, and ``data`` ``dataset``: see ``SECTION_ALIASES``.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    threads: Count | None = 1
    precision: Precision = "fp32"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    unlearn: UnlearnConfig = UnlearnConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()
    images: ImagesConfig = ImagesConfig()
    text_to_image: TextToImageConfig = TextToImageConfig()
    output: OutputConfig = OutputConfig()
    distributed: DistributedConfig = DistributedConfig()

    def section(self, kind: type[SectionT]) -> SectionT:
        """Settings of one method, by their class: ``config.section(EsdConfig)`` is ``config.esd``, typed."""
        return next(value for value in vars(self).values() if type(value) is kind)

    def to_yaml(self, exclude: Mapping[str, set[str]] | None = None) -> str:
        """Dump as YAML that ``load_config`` reads back to an equal configuration, without the keys to ``exclude``."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude=dict(exclude or {})), sort_keys=False)


BASE_FIELDS = frozenset(Config.model_fields)
"""Settings and sections that do not belong to a method."""


def register_sections(sections: Mapping[str, type[Section]]) -> None:
    """Add sections to ``Config``, by their keys: the settings of the methods."""
    for name, section in sections.items():
        Config.model_fields[name] = FieldInfo.from_annotated_attribute(section, section())
    Config.model_rebuild(force=True)
