"""Trainable weights: the literature's named subsets, or a regular expression over names; frozen copies."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Collection

from torch import nn

from erasediff.errors import UserError
from erasediff.models.family import UNET_SUBSETS, Subsets, family_of_denoiser

Rule = Callable[[str], bool]

ESD_NAMES = {"esd-x": "xattn", "esd-x-strict": "xattn-kv", "esd-u": "noxattn", "esd-all": "full"}


def select(module: nn.Module, spec: str) -> list[str]:
    """Select trainable parameters of a UNet or transformer by name, in the module's order.

    The names were coined for UNets. SDXL's embedding of sizes counts as one of time. In the joint attention of SD3 and
    FLUX, cross-attention is taken to be the text's own projections, and self-attention the others. Where they lie is
    the family's ``subsets``; a network of no family is taken for a UNet. Without prompts there is no cross-attention.

    Args:
        module: The network.
        spec: One of

            - full: all
            - xattn: cross-attention: ESD-x of Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345)
            - xattn-kv: its key and value projections: "ESD-x strict" in the authors' code
            - noxattn: all but cross-attention, the outermost layers and the embedding of time: ESD-u
            - selfattn: self-attention
            - notime: all but the outermost layers and the embedding of time
            - esd-x, esd-x-strict, esd-u, esd-all: xattn, xattn-kv, noxattn and full by the names of ESD's authors
            - re:...: the parameters whose name a regular expression finds

    Raises:
        UserError: ``spec`` is none of these, a broken expression, or selects nothing; with near matches.
    """
    names = [name for name, _ in module.named_parameters()]
    family = family_of_denoiser(module)
    rule = _rule(spec, UNET_SUBSETS if family is None else family.subsets)
    chosen = [name for name in names if rule(name)]
    if not chosen:
        raise UserError(f"The selection {spec!r} matches no weight of this model{_hint(spec, names)}.")
    return chosen


def has_attention(module: nn.Module) -> bool:
    """Whether ``select`` finds self-attention in a network."""
    family = family_of_denoiser(module)
    parts = (UNET_SUBSETS if family is None else family.subsets).self_attention
    return any(not parts.isdisjoint(name.split(".")) for name, _ in module.named_parameters())


def train_only(module: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """Freeze everything but the parameters called ``names``, and return those.

    Raises:
        ValueError: The module has no parameter of one of the names.
    """
    parameters = dict(module.named_parameters())
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"the module has no parameter {unknown[0]!r}")
    module.requires_grad_(False)
    chosen = [parameters[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _rule(spec: str, subsets: Subsets) -> Rule:
    if spec.startswith("re:"):
        try:
            expression = re.compile(spec.removeprefix("re:"))
        except re.error as error:
            raise UserError(f"The selection {spec!r} is not a regular expression: {error}.") from error
        return lambda name: expression.search(name) is not None
    rules = _rules(subsets)
    if spec not in rules:
        near = difflib.get_close_matches(spec, rules, n=1, cutoff=0.5)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"There is no selection {spec!r}{meant}: give one of {', '.join(rules)}, or re:<expression>.")
    return rules[spec]


def _rules(subsets: Subsets) -> dict[str, Rule]:
    def cross(name: str) -> bool:
        return not subsets.cross_attention.isdisjoint(name.split("."))

    def of_self(name: str) -> bool:
        return not cross(name) and not subsets.self_attention.isdisjoint(name.split("."))

    def key_or_value(name: str) -> bool:
        return not subsets.keys_and_values.isdisjoint(name.split("."))

    def inner(name: str) -> bool:
        return not name.startswith(subsets.outermost) and subsets.embeddings.isdisjoint(name.split("."))

    rules: dict[str, Rule] = {
        "full": lambda name: True,
        "xattn": cross,
        "xattn-kv": lambda name: cross(name) and key_or_value(name),
        "noxattn": lambda name: inner(name) and not cross(name),
        "selfattn": of_self,
        "notime": inner,
    }
    return rules | {alias: rules[name] for alias, name in ESD_NAMES.items()}


def _hint(spec: str, names: list[str]) -> str:
    wanted = spec.removeprefix("re:")
    words = sorted({word for name in names for word in name.split(".") if not word.isdigit()})
    unknown = [word for word in re.findall(r"\w+", wanted) if word not in words]
    near = {match for word in unknown for match in difflib.get_close_matches(word, words, n=3, cutoff=0.6)}
    if near:
        return f"; near matches are {', '.join(sorted(near))}"
    return f"; its weights are named like {', '.join(names[:: max(1, len(names) // 3)][:3])}"


def frozen_copy(network: nn.Module, *, share_frozen: bool) -> nn.Module:
    """Copy of ``network`` as it is now, in evaluation mode, without gradients.

    Args:
        network: The network.
        share_frozen: Copy only the parameters that are trained: where those are the cross-attentions of Stable
            Diffusion 1.5, a twentieth. Frozen parameters that a wrapper is going to cut into shards must not be shared.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared if share_frozen else {}).requires_grad_(False).eval()
