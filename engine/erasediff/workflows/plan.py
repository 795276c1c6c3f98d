"""Plan a run from its configuration: memory per GPU and FLOPs per step, without weights or a GPU."""

from collections.abc import Sequence

import torch

from erasediff.config import Config, for_text_to_image
from erasediff.errors import UserError
from erasediff.planning.memory import Layout, buckets_of
from erasediff.planning.overview import Overview, overview
from erasediff.planning.reference_models import Network, network_of
from erasediff.planning.step_plan import dtypes, run_precision
from erasediff.workflows.build_method import check_settings, method_parameters, needed_batches, selected_weights
from erasediff.workflows.record_passes import step_plan
from erasediff.workflows.unlearn_pixel import check_unprompted

PIXEL_NETWORK = "UNet2DModel"


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
    is_pixel = type(network.module).__name__ == PIXEL_NETWORK
    config = _pixel_defaults(config, network) if is_pixel else for_text_to_image(config)
    step = step_plan(config)
    needed_batches(config)
    with torch.device("meta"):
        _choose_trained(config, network, is_pixel=is_pixel)
    buckets: Layout = buckets_of(config.distributed.deepspeed_config)
    return overview(network, step, ranks=ranks, buckets=buckets)


def _resolution(config: Config) -> int | None:
    """Pixels along each side. UserError for sides that differ."""
    height, width = config.images.height, config.images.width
    if height != width:
        raise UserError(f"A plan is for square images: set images.height and images.width alike, not {height}x{width}.")
    return height


def _pixel_defaults(config: Config, network: Network) -> Config:
    """Fill in the defaults of a model without prompts wherever nothing was set. UserError for a method of prompts."""
    check_unprompted(config)
    network_config = network.module.config
    conditional = bool(getattr(network_config, "num_class_embeds", None))
    return config.model_copy(update={"unlearn": config.unlearn.resolved(conditional=conditional, retained=(0, 1))})


def _choose_trained(config: Config, network: Network, *, is_pixel: bool) -> None:
    """Set ``requires_grad`` of the parameters that a run trains, and of no others."""
    selected = None
    if not is_pixel or "train" in config.text_to_image.model_fields_set:
        selected = selected_weights(config, network.module)
    trained = {id(parameter) for parameter in method_parameters(config, network.module, selected)}
    for parameter in network.module.parameters():
        parameter.requires_grad_(id(parameter) in trained)
