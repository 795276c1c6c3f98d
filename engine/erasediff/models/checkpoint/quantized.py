"""Quantised weights: scaled float8 is read as what it stands for, every other kind is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.json_file import parse_object
from erasediff.io.tensor_file import StoredTensor

WEIGHT_SCALES = (".scale_weight", ".weight_scale")
"""Beside a weight of ComfyUI's scaled float8: what it is to be multiplied by, one number or one for each row."""
INPUT_SCALES = (".scale_input", ".input_scale")
"""Beside them: the scale of the layer's input where the product itself is taken in float8, which it is not here."""
MARKER = "scaled_fp8"
SETTINGS = ".comfy_quant"
"""Of ComfyUI since 2025: JSON as bytes, with the weight's "format"."""
QUANTIZED = {
    **dict.fromkeys(
        (".absmax", ".quant_map", ".quant_state", ".nested_absmax", ".SCB", ".weight_format"), "bitsandbytes"
    ),
    **dict.fromkeys((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    **dict.fromkeys(("._data", "._scale"), "quanto"),
    **dict.fromkeys((".weight_packed", ".weight_scale_inv", ".weight_scale_2"), "blocks of low precision"),
}
"""Words in the names of what other kinds store beside a weight, or in its place."""
LARGEST_SETTINGS = 65_536
"""Bytes of such an entry."""
ADVICE = "give the unquantized weights, in float32, float16 or bfloat16"


def refuse_quantized(name: str, config: Mapping[str, object]) -> None:
    """Raise UserError for a component, called ``name``, whose configuration says that it is quantised."""
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        raise UserError(f"The {name} is quantized{f' by {method}' if method else ''}: {ADVICE}.")


def unscaled(tensors: Mapping[str, StoredTensor], source: object) -> dict[str, StoredTensor]:
    """Weights of a file with each scaled one multiplied by its scale, in bfloat16, and without scales and markers.

    bfloat16 holds the range that the scale restores, and rounds to a thirtieth of a float8's own step.

    Args:
        tensors: Of one file or component, by name.
        source: Of the message: the file, or the folder.

    Raises:
        UserError: A weight is quantised in another way, or a scale has no weight that it fits.
    """
    plain, scales = {}, {}
    for name, tensor in tensors.items():
        if kind := next((kind for end, kind in QUANTIZED.items() if f"{end}." in f"{name}."), None):
            raise UserError(f"{source} is quantized ({kind}: {name}): {ADVICE}.")
        if end := next((end for end in WEIGHT_SCALES if name.endswith(end)), None):
            scales[f"{name.removesuffix(end)}.weight"] = (name, tensor)
        elif name.endswith(SETTINGS):
            _check_settings(name, tensor, source)
        elif not name.endswith(INPUT_SCALES) and name.rpartition(".")[2] != MARKER:
            plain[name] = tensor
    for weight, (name, scale) in scales.items():
        if weight not in plain or not plain[weight].dtype.is_floating_point:
            raise UserError(f"{source} is quantized ({name} scales no weight of floating point): {ADVICE}.")
        if prod(scale.shape) not in (1, plain[weight].shape[0]):
            raise UserError(f"{source} is quantized ({name} is {list(scale.shape)}, not one for each row): {ADVICE}.")
        plain[weight] = _multiplied(plain[weight], scale)
    return plain


def _multiplied(weight: StoredTensor, scale: StoredTensor) -> StoredTensor:
    def load() -> Tensor:
        factor = scale.load().float().reshape(-1, *[1] * (len(weight.shape) - 1))
        return (weight.load().float() * factor).reshape(weight.shape).to(torch.bfloat16)

    return StoredTensor(torch.bfloat16, weight.shape, load)


def _check_settings(name: str, tensor: StoredTensor, source: object) -> None:
    try:
        if prod(tensor.shape) > LARGEST_SETTINGS:
            raise ValueError("it is too long")
        kind = parse_object(bytes(tensor.load().flatten().tolist()))["format"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{source} is damaged: {name} names no format.") from None
    if not str(kind).startswith("float8_"):
        raise UserError(f"{source} is quantized ({kind}, by {name}): {ADVICE}.")
