"""Unlearning jobs of any method on any model: settings, trained parameters, solver, saving."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erasediff.config import Config, UnlearnConfig, given_settings
from erasediff.diffusion.batch import Batch, Denoiser
from erasediff.diffusion.noise_schedule import Process
from erasediff.diffusion.targets import Relabel
from erasediff.errors import UserError
from erasediff.io.tensor_file import LazyWeights
from erasediff.methods import METHOD_SPECS, BuildContext, MethodSpec
from erasediff.methods.base import Solver, SolverOptions
from erasediff.models import lora
from erasediff.models.checkpoint.base import weighted_components
from erasediff.models.checkpoint_model import CheckpointModel
from erasediff.models.trainable import select, train_only
from erasediff.models.weight_update import SavedDtype, WeightUpdate, host_copy, measure_update
from erasediff.parallel.factory import gradients_for
from erasediff.parallel.init import share_of
from erasediff.training.job import TrainingJob, parallelize, precision_of, teacher_of
from erasediff.training.loop import Batches
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import MODEL, SINGLE_FILE
from erasediff.training.run_size import run_bytes
from erasediff.verdict.quick import QuickQuestion
from erasediff.workflows.goal import rounds_of
from erasediff_kernels import ConstrainedAdamW

ADAPTERS = "lora.safetensors"
SaveModel = Callable[[Path], WeightUpdate | None]
"""Writes a model to a path, and returns how its weights differ from those before the first step, where it tells."""


def selected_weights(config: Config, network: nn.Module) -> list[str]:
    """Names of the weights that are trained, or that a LoRA is to adapt. UserError for a selection of nothing."""
    settings = config.text_to_image
    return select(network, settings.lora_targets if settings.train == "lora" else settings.train)


def trained_parameters(config: Config, network: nn.Module, selected: list[str]) -> list[nn.Parameter]:
    """Parameters to train, those ``selected`` or their adapters; all others are frozen."""
    settings = config.text_to_image
    if settings.train != "lora":
        return train_only(network, selected)
    return lora.add(network, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=selected, seed=config.seed)


def check_output(config: Config, model: CheckpointModel) -> None:
    """Raise UserError for what would fail when the model is saved, before the work instead of after it.

    That is a layout or LoRA keys that the family lacks, and a part of the checkpoint that cannot be copied.
    """
    model.checkpoint.check_small_files()
    settings, training_lora = config.output, config.text_to_image.train == "lora"
    if training_lora and config.text_to_image.saliency is not None:
        raise UserError(
            "Saliency selects among the model's own weights; omit text_to_image.saliency with --train lora."
        )
    if model.original_layout is not None:
        return
    if settings.layout == "single-file":
        raise UserError(f"A {model.family} model has no single-file layout here: set output.layout to diffusers.")
    if training_lora and settings.lora_keys == "kohya":
        raise UserError(
            f"A LoRA of the family {model.family} has no kohya keys here: set output.lora_keys to diffusers."
        )


def saved_bytes(config: Config, model: CheckpointModel) -> int:
    """Bytes of the weights that ``save_unlearned`` writes, as they are stored or in ``output.dtype``."""
    dtype = _dtype(config)
    return sum(
        tensor.cast(dtype if isinstance(dtype, torch.dtype) else None).nbytes
        for component in weighted_components(model.checkpoint)
        for tensor in model.checkpoint.tensors(component).values()
    )


def _dtype(config: Config) -> SavedDtype:
    name = config.output.dtype
    return name if name is None or name == "stored" else getattr(torch, name)


def output_name(config: Config) -> str:
    """Name of the saved model in the run's folder."""
    return MODEL if config.output.layout == "diffusers" else SINGLE_FILE


def save_unlearned(config: Config, model: CheckpointModel, path: Path) -> WeightUpdate:
    """Write the model to ``path``; a LoRA also as a file of its own beside it, and merged into the model.

    Returns:
        The difference from the checkpoint.

    Raises:
        RunFailedError: Nothing was learned, or what was is not finite; nothing is written but a LoRA that was learned.
    """
    settings = config.output
    if config.text_to_image.train == "lora":
        lora.check_trained(model.denoiser)
        lora.save(model.denoiser, path.with_name(ADAPTERS), family=model.family, keys=settings.lora_keys)
        lora.merge(model.denoiser, torch.float32)
    dtype = _dtype(config)
    update = model.measure_update(dtype).check()
    model.save(
        path,
        layout=settings.layout,
        dtype=dtype,
        max_shard_size=settings.max_shard_bytes,
        replace=True,
        update=update,
    )
    return update


def differs_by_training(config: Config) -> bool:
    """Return false if a LoRA is merged first, and weights are trained that it may have changed."""
    is_lora_or_mask = config.text_to_image.train == "lora" or METHOD_SPECS[config.unlearn.method].trained is not None
    return config.text_to_image.lora is None or is_lora_or_mask


def save_measured(network: nn.Module, original: LazyWeights, save: SaveModel, path: Path) -> WeightUpdate:
    """Write a model with ``save``, if ``network`` differs from ``original``; return the difference that ``save`` tells.

    Raises:
        RunFailedError: No weight differs, or one is not finite; nothing is written.
    """
    update = measure_update(original, network.state_dict()).check()
    return save(path) or update


def check_settings(config: Config, given: Collection[str] = ()) -> None:
    """Raise UserError for a given setting of ``unlearn`` or of a method that the method does not read.

    Args:
        config: As the user wrote it, before any default is filled in.
        given: Dotted names of settings that were given besides ``given_settings``: flags of a resumed run, whose
            configuration lists every setting.
    """
    spec = METHOD_SPECS[config.unlearn.method]
    keys, sections = spec.reads(config), {spec.section, *spec.sections}
    owners = {other.section: other.name for other in METHOD_SPECS.values() if other.config is not None}
    for name in (*given_settings(config), *given):
        section, _, key = name.partition(".")
        if (section in owners and section not in sections) or (section == "unlearn" and key not in keys):
            owner = f", a setting of {owners[section]}" if section in owners else ""
            namesake = spec.config is not None and key in spec.config.model_fields
            advice = f"set {spec.section}.{key}" if namesake else f"it reads {_readable(spec, keys, sections)}"
            raise UserError(f"The method {spec.name} does not read {name}{owner}: {advice}.")


def _readable(spec: MethodSpec, keys: Collection[str], sections: Collection[str]) -> str:
    existing = sorted(other.section for other in METHOD_SPECS.values() if other.config is not None)
    whole_sections = [f"all of {section}" for section in existing if section in sections]
    return " and ".join([f"unlearn.{{{', '.join(sorted(keys))}}}", *whole_sections])


def needed_batches(config: Config) -> bool:
    """Return true if the method reads images."""
    needs = METHOD_SPECS[config.unlearn.method].needs(config)
    return needs.retain or needs.forget


@dataclass(frozen=True, slots=True)
class NoBatches:
    """Empty batches, for a method that does not read one kind of data."""

    def at(self, step: int) -> Batch:
        return {}


def _no_prompts(prompts: Sequence[str] = ()) -> dict[str, Tensor]:
    raise UserError("This method needs a concept's prompts: give a text-to-image model and --forget-prompts.")


def _no_latents() -> tuple[int, ...]:
    raise UserError("This method needs a concept's prompts: give a text-to-image model and --forget-prompts.")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearningModel:
    """Model of an unlearning job, in pixel or latent space.

    Attributes:
        network: The network that is trained.
        process: Noise schedule and prediction type.
        predict: How the network is called.
        save: Writes the model to a path, and returns its difference from the source if ``is_measured``.
        saved_bytes: Size of the saved model; None for that of the network.
        is_measured: ``save`` compares the weights with the source itself, and refuses a model in which none changed.
        relabel: Relabelling target, given a frozen copy of the network on demand.
        saved_as: Name of the model in the run's folder.
        weights: Lazy weights by name, of a network that is still empty.
        optimizer_options: Further keywords of ``ConstrainedAdamW``.
        encode_prompts: See ``BuildContext``.
        latent_shape: See ``BuildContext``.
        question: Question of the looks of a run that goes on until it has forgotten; None for one of so many steps.
    """

    network: nn.Module
    process: Process
    predict: Denoiser
    save: SaveModel
    relabel: Callable[[Callable[[], nn.Module]], Relabel]
    saved_bytes: int | None = None
    is_measured: bool = False
    saved_as: str = MODEL
    weights: LazyWeights | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    encode_prompts: Callable[[Sequence[str]], dict[str, Tensor]] = _no_prompts
    latent_shape: Callable[[], tuple[int, ...]] = _no_latents
    question: QuickQuestion | None = None


def build_training_job(
    config: Config, model: UnlearningModel, parameters: Iterable[nn.Parameter], retain: Batches, forget: Batches
) -> TrainingJob:
    """Build the job of ``config.unlearn.method`` that trains ``parameters`` of ``model``."""
    settings = config.unlearn
    rate = learning_rate(settings)
    parameters = list(parameters)
    save = (
        model.save
        if model.is_measured
        else partial(save_measured, model.network, _original(config, model.network, parameters), model.save)
    )
    disk_bytes = run_bytes(config, settings, model.network, parameters, model.saved_bytes)
    teacher = teacher_of(config, model.network, model.weights)
    make_optimizer = partial(
        ConstrainedAdamW,
        lr=rate.peak,
        weight_decay=settings.weight_decay,
        ema_decay=settings.ema_decay,
        moments=settings.moments,
        **model.optimizer_options,
    )
    if model.question is not None:
        # Before the first step, and before ranks share the network.
        teacher()
    trained, optimizer = parallelize(config, settings, model.network, parameters, make_optimizer, model.weights)
    method = unlearning_method(config, model, trained, optimizer, teacher=teacher, retain=retain, forget=forget)
    return TrainingJob(
        title=f"Unlearning ({settings.method})",
        config=config,
        network=model.network,
        save=partial(finalize_and_save, method, save),
        saved_as=model.saved_as,
        disk_bytes=disk_bytes,
        optimizer=optimizer,
        method=method,
        rate=rate,
        retain=retain,
        forget=forget,
        rounds=None if model.question is None else rounds_of(config, method, teacher, model.predict, model.question),
    )


def _original(config: Config, network: nn.Module, parameters: Sequence[nn.Parameter]) -> LazyWeights:
    """Copy of the weights that training may change: ``parameters``, or all where those are the method's own."""
    return host_copy(network, parameters if METHOD_SPECS[config.unlearn.method].trained is None else None)


def unlearning_method(
    config: Config,
    model: UnlearningModel,
    network: nn.Module,
    optimizer: ConstrainedAdamW,
    *,
    teacher: Callable[[], nn.Module],
    retain: Batches,
    forget: Batches,
) -> Solver:
    """Build ``config.unlearn.method`` for ``network``, which is ``model``'s in its parallel wrapper."""
    settings = config.unlearn
    options: SolverOptions = {
        "denoiser": model.predict,
        "min_snr_gamma": settings.min_snr_gamma,
        "antithetic": settings.antithetic,
        "max_grad_norm": settings.max_grad_norm,
        "accumulation_steps": settings.accumulation_steps,
        "autocast": precision_of(config),
        "seed": config.seed,
    }
    if not config.distributed.own_reduction:
        options["gradients"] = gradients_for(network, optimizer, own_reduction=False)
    build = METHOD_SPECS[settings.method].build
    assert build is not None, f"{settings.method} takes no optimizer steps"
    return build(
        BuildContext(
            config=config,
            network=network,
            optimizer=optimizer,
            process=model.process,
            denoiser=model.predict,
            options=options,
            relabel=partial(model.relabel, teacher),
            teacher=teacher,
            encode_prompts=model.encode_prompts,
            latent_shape=model.latent_shape,
            prompts=config.images.forget_prompts,
            batch_size=settings.batch_size // share_of(settings.batch_size, "unlearn.batch_size")["world_size"],
            forget_batches=lambda count: map(forget.at, range(count)),
            retain_batches=lambda count: map(retain.at, range(count)),
        )
    )


def learning_rate(settings: UnlearnConfig) -> LearningRate:
    """Learning-rate schedule of ``settings``."""
    assert settings.lr is not None
    assert settings.steps is not None
    return LearningRate(settings.lr, settings.steps, settings.warmup_steps, settings.lr_schedule)


def method_parameters(config: Config, network: nn.Module, selected: Sequence[str]) -> list[nn.Parameter]:
    """Parameters that the method trains, of the weights ``selected``."""
    trained = METHOD_SPECS[config.unlearn.method].trained
    if trained is None:
        return trained_parameters(config, network, list(selected))
    if config.text_to_image.train == "lora":
        raise UserError(
            f"The method {config.unlearn.method} trains parameters of its own; choose weights with --train, not lora."
        )
    return trained(config, network, selected)


def finalize_and_save(method: Solver, save: SaveModel, path: Path) -> WeightUpdate | None:
    """Write the method's own files beside the model's ``path``, and the model with ``save``; return what that does."""
    finalize = METHOD_SPECS[method.name].finalize
    if finalize is not None:
        finalize(method, path)
    return save(path)
