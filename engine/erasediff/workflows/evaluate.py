"""Evaluate a model without prompts with a classifier, alone or against the model that it was unlearned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from erasediff.config import Config
from erasediff.data import ClassDataset, class_numbers, forget_retain_split
from erasediff.errors import UserError
from erasediff.evaluation import (
    ConditionalMetrics,
    Judge,
    UnconditionalMetrics,
    conditional_metrics,
    evaluation_labels,
    unconditional_metrics,
)
from erasediff.models.diffusion_model import UnpromptedModel
from erasediff.models.pixel_unet import PixelImages
from erasediff.training.job import set_up_device, thread_scope
from erasediff.workflows.labelled_data import class_dataset, for_data, open_data
from erasediff.workflows.load_model import load_unprompted
from erasediff.workflows.sample import draw

Metrics = ConditionalMetrics | UnconditionalMetrics


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """Images [N, C, H, W] of a model, their requested classes int64 [N] (None: unconditional), and metrics."""

    images: Tensor
    labels: Tensor | None
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Evaluation of models by name: ``model``, and ``base`` if one was given."""

    judge: Judge
    models: dict[str, EvaluatedModel]

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, without images."""
        judge = {"accuracy": self.judge.accuracy, "rejected": self.judge.rejected}
        return {"judge": judge} | {name: model.metrics.to_dict() for name, model in self.models.items()}


@thread_scope()
def evaluate(
    config: Config, model: Path, base: Path | None, forget: Sequence[int | str], console: Console
) -> Evaluation:
    """Evaluate the model in the diffusers folder ``model`` on forgetting the classes ``forget``.

    The classifier is fitted to images of the data (see ``class_dataset``); the evaluation tells its accuracy.

    Raises:
        UserError: A model cannot be read or compared, a class does not exist, or the data have no classes.
    """
    config = for_data(config)
    data = open_data(config)
    if not data.class_names:
        raise UserError("A classifier evaluates forgetting, but these data have no classes: give --data with some.")
    forgotten = class_numbers(forget, data.class_names)
    device = set_up_device(config)
    paths = {"model": model} if base is None else {"base": base, "model": model}
    models = {name: data.fit(load_unprompted(path, device, console), path) for name, path in paths.items()}
    if len({(loaded.num_classes, loaded.image_shape) for loaded in models.values()}) > 1:
        raise UserError(f"{model} and {base} cannot be compared: their classes or sizes of images differ.")
    dataset = class_dataset(config, data, PixelImages(models["model"].image_shape), console)
    forget_retain_split(dataset.train, forgotten)
    judge = Judge.fit(dataset)
    evaluated = {
        name: judge_model(config, loaded, judge, dataset, forgotten, console, f"Sampling from the {name}")
        for name, loaded in models.items()
    }
    return Evaluation(judge=judge, models=evaluated)


def judge_model(
    config: Config,
    model: UnpromptedModel,
    judge: Judge,
    dataset: ClassDataset,
    forget: Sequence[int],
    console: Console,
    title: str,
) -> EvaluatedModel:
    """Sample the images of ``config.evaluate`` with the configuration's seed, and evaluate them."""
    settings, forgotten = config.evaluate, tuple(forget)
    if model.condition == "none":
        images = draw(config, model, None, settings.unconditional, console, title)
        return EvaluatedModel(
            images=images, labels=None, metrics=unconditional_metrics(judge, images, dataset.train, forgotten)
        )
    labels = evaluation_labels(
        dataset.num_classes, forgotten, per_class=settings.per_class, forgotten=settings.forgotten
    )
    images = draw(config, model, labels, len(labels), console, title)
    metrics = conditional_metrics(judge, images, labels, dataset.train, forgotten)
    return EvaluatedModel(images=images, labels=labels, metrics=metrics)
