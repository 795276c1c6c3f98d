"""The one name of a weight that releases of diffusers and transformers have stored under several."""

LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def canonical_name(name: str) -> str:
    """CLIP's without "text_model.", and the VAE's attention as it is called since diffusers 0.15."""
    name = name.removeprefix("text_model.")
    layer, _, weight = name.rpartition(".")
    block, _, last = layer.rpartition(".")
    return f"{block}.{LEGACY_ATTENTION[last]}.{weight}" if last in LEGACY_ATTENTION else name
