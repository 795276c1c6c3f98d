"""The checkpoint's scheduler, refused where it contradicts what the network predicts."""

from __future__ import annotations

from typing import Any

from erasediff.errors import UserError
from erasediff.models.checkpoint import Checkpoint
from erasediff.models.components import component_class

MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}


def load_scheduler(checkpoint: Checkpoint, *, flow: bool) -> Any:
    """The scheduler as diffusers builds it. UserError if it is not one for the network; ``flow``: a flow-matching one.

    A contradiction is a scheduler of the other kind; epsilon prediction under a schedule that ends in pure noise, where
    it says nothing about the image (Lin et al. 2023, section 3.2); or another type than the weights' own ModelSpec
    metadata records.
    """
    cls = component_class(checkpoint, "scheduler")
    config = checkpoint.config("scheduler")
    scheduler = cls.from_config(config)
    predicts = f"The scheduler of {checkpoint.path} contradicts its network: "
    if flow != ("FlowMatch" in cls.__name__):
        kind = "by flow matching" if flow else "by denoising diffusion"
        raise UserError(f"{predicts}{cls.__name__} is not for a network trained {kind}.")
    if flow:
        return scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"The scheduler {cls.__name__} of {checkpoint.path} has no noise schedule (alphas_cumprod).")
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in MODELSPEC_PREDICTIONS.values():
        raise UserError(f"{predicts}its prediction_type {prediction_type!r} is none of epsilon, v_prediction, sample.")
    if prediction_type == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{predicts}it predicts epsilon, but rescale_betas_zero_snr makes the last timestep pure noise, which only "
            "v_prediction can be trained on."
        )
    recorded = MODELSPEC_PREDICTIONS.get(checkpoint.metadata.get("modelspec.prediction_type", ""))
    if recorded not in (None, prediction_type):
        raise UserError(f"{predicts}its prediction_type is {prediction_type}, the weights record {recorded}.")
    return scheduler
