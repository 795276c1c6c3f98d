"""Plan a run from its configuration: memory per GPU and FLOPs per step, without weights or a GPU."""

from collections.abc import Sequence

import torch

from erasediff.config import Config, for_text_to_image
from erasediff.errors import UserError
from erasediff.models.base import LatentModel
from erasediff.planning.memory import Layout, buckets_of
from erasediff.planning.overview import Overview, overview
from erasediff.planning.reference_models import Network, network_of
from erasediff.planning.step_plan import dtypes, run_precision
from erasediff.workflows.build_method import check_settings, method_parameters, needed_batches, selected_weights
from erasediff.workflows.labelled_run import check_unprompted, for_unprompted, unprompted_weights
from erasediff.workflows.record_passes import step_plan


def plan(config: Config, source: str, *, ranks: Sequence[int] = (1, 8, 64)) -> Overview:
    """Plan the run that `erasediff unlearn` makes of ``config`` on the model ``source``.

    Args:
        config: Configuration as read; defaults of the kind of model are filled in as in a run.
        source: See ``planning.network_of``.
        ranks: Numbers of processes to plan for, each with the batch of one of ``config.distributed.processes``.

    Raises:
        UserError: For a source, a selection of weights or settings that no run can have.
    """
    check_settings(config)
    network = network_of(source, _resolution(config), dtypes(run_precision(config))[0])
    has_prompts = issubclass(network.family, LatentModel)
    config = for_text_to_image(config) if has_prompts else _unprompted_defaults(config, network)
    step = step_plan(config)
    needed_batches(config)
    with torch.device("meta"):
        _choose_trained(config, network, has_prompts=has_prompts)
    buckets: Layout = buckets_of(config.distributed.deepspeed_config)
    return overview(network, step, ranks=ranks, buckets=buckets)


def _resolution(config: Config) -> int | None:
    """Pixels along each side. UserError for sides that differ."""
    height, width = config.images.height, config.images.width
    if height != width:
        raise UserError(f"A plan is for square images: set images.height and images.width alike, not {height}x{width}.")
    return height


def _unprompted_defaults(config: Config, network: Network) -> Config:
    """Fill in the defaults of a model without prompts wherever nothing was set. UserError for a method of prompts."""
    check_unprompted(config)
    config = for_unprompted(config)
    is_conditional = "class_labels" in network.inputs(1, network.dtype, "meta")
    return config.model_copy(update={"unlearn": config.unlearn.resolved(conditional=is_conditional, retained=(0, 1))})


def _choose_trained(config: Config, network: Network, *, has_prompts: bool) -> None:
    """Set ``requires_grad`` of the parameters that a run trains, and of no others."""
    select = selected_weights if has_prompts else unprompted_weights
    trained = {id(p) for p in method_parameters(config, network.module, select(config, network.module))}
    for parameter in network.module.parameters():
        parameter.requires_grad_(id(parameter) in trained)
