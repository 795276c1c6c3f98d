"""ModelSpec metadata: what a safetensors file says of the model in it.

Source: https://github.com/Stability-AI/ModelSpec, version 1.0.1. The date is left out: equal models are equal files.
"""

from __future__ import annotations

from collections.abc import Mapping

STABILITY_AI = "https://github.com/Stability-AI/generative-models"
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def modelspec(
    source: Mapping[str, str], *, architecture: str, implementation: str, prediction_type: str, size: tuple[int, int]
) -> dict[str, str]:
    """The metadata of an unlearned model: the source's, hashes and date left out, with what is known here filled in."""
    kept = {name: value for name, value in source.items() if "hash" not in name and name != "modelspec.date"}
    known = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.resolution": f"{size[1]}x{size[0]}",
    }
    if prediction_type in PREDICTIONS:
        known["modelspec.prediction_type"] = PREDICTIONS[prediction_type]
    return {"modelspec.title": "Unlearned model", "format": "pt", **kept, **known}
