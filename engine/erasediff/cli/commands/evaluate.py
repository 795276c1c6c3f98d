from pathlib import Path
from typing import Annotated

import typer

from erasediff.cli import options
from erasediff.cli.output import emit, loading, messages, metrics_table


def evaluate(
    model: Annotated[Path, typer.Option(help="The diffusers folder to evaluate.")],
    forget: Annotated[str, typer.Option(help="The classes that it should have forgotten, such as 3 or airplane,5.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="The data set that it was trained on, with classes, as in train --data: a classifier learns them from "
            "it. By default the digits."
        ),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The model that it was unlearned from, to compare with.")] = None,
    guidance: options.Guidance = None,
    seed: options.Seed = None,
    device: options.Device = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Evaluate samples of a model with a classifier trained on real images."""
    full_config = options.configure(
        config, settings, images__data=data, sample__guidance_scale=guidance, seed=seed, device=device
    )
    forgotten = options.class_references(forget) or []
    with loading(messages):
        from erasediff.workflows.evaluate import evaluate as judge_models
    evaluation = judge_models(full_config, model, base, forgotten, messages)
    columns = {name: model.metrics for name, model in evaluation.models.items()}
    emit(evaluation.to_dict(), as_json=as_json, shown=metrics_table(columns))
