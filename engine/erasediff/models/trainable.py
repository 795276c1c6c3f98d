"""Which weights are trained: the literature's named subsets, or a regular expression over names."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable, Collection

from torch import nn

from erasediff.errors import UserError

Rule = Callable[[str], bool]

_JOINT_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ESD_NAMES = {"esd-x": "xattn", "esd-x-strict": "xattn-kv", "esd-u": "noxattn", "esd-all": "full"}
_OUTER = ("conv_norm_out.", "conv_out.", "norm_out.", "proj_out.")
_TIME = ("time_embedding.", "add_embedding.", "time_text_embed.")


def select(module: nn.Module, spec: str) -> list[str]:
    """Names of the parameters of a UNet or transformer that ``spec`` stands for, in the module's order.

    full:     all
    xattn:    cross-attention: ESD-x of Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345)
    xattn-kv: its key and value projections: "ESD-x strict" in the authors' code
    noxattn:  all but cross-attention, the outermost layers and the embedding of time: ESD-u
    selfattn: self-attention
    notime:   all but the outermost layers and the embedding of time
    esd-x, esd-x-strict, esd-u, esd-all: xattn, xattn-kv, noxattn and full by the names of ESD's authors
    re:...    the parameters whose name a regular expression finds

    The names were coined for UNets. SDXL's embedding of sizes counts as one of time. In the joint attention of SD3 and
    FLUX, cross-attention is taken to be the text's own projections, and self-attention the others.

    UserError for a word that is none of these, a broken expression, and a selection of nothing, with near matches.
    """
    names = [name for name, _ in module.named_parameters()]
    rule = _rule(spec, joint=any(".add_k_proj." in name for name in names))
    chosen = [name for name in names if rule(name)]
    if not chosen:
        raise UserError(f"The selection {spec!r} matches no weight of this model{_hint(spec, names)}.")
    return chosen


def train_only(module: nn.Module, names: Collection[str]) -> list[nn.Parameter]:
    """Freeze everything but the parameters called ``names``, and return those.

    Raises ``ValueError`` for a name that the module does not have.
    """
    parameters = dict(module.named_parameters())
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"the module has no parameter {unknown[0]!r}")
    module.requires_grad_(False)
    chosen = [parameters[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _rule(spec: str, *, joint: bool) -> Rule:
    if spec.startswith("re:"):
        try:
            expression = re.compile(spec.removeprefix("re:"))
        except re.error as error:
            raise UserError(f"The selection {spec!r} is not a regular expression: {error}.") from error
        return lambda name: expression.search(name) is not None
    rules = _rules(joint)
    if spec not in rules:
        near = difflib.get_close_matches(spec, rules, n=1, cutoff=0.5)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"There is no selection {spec!r}{meant}: give one of {', '.join(rules)}, or re:<expression>.")
    return rules[spec]


def _rules(joint: bool) -> dict[str, Rule]:
    def words(name: str) -> set[str]:
        return set(name.split("."))

    def cross(name: str) -> bool:
        return bool(words(name) & set(_JOINT_TEXT)) if joint else "attn2" in words(name)

    def of_self(name: str) -> bool:
        return (
            ("attn" in words(name) or "attn2" in words(name)) and not cross(name) if joint else "attn1" in words(name)
        )

    def key_or_value(name: str) -> bool:
        return bool(words(name) & {"to_k", "to_v", "add_k_proj", "add_v_proj"})

    def inner(name: str) -> bool:
        return not name.startswith((*_OUTER, *_TIME))

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
    asked = [word for word in re.findall(r"\w+", wanted) if word not in words]
    near = {match for word in asked for match in difflib.get_close_matches(word, words, n=3, cutoff=0.6)}
    if near:
        return f"; near matches are {', '.join(sorted(near))}"
    return f"; its weights are named like {', '.join(names[:: max(1, len(names) // 3)][:3])}"


def frozen_copy(network: nn.Module, *, share_frozen: bool) -> nn.Module:
    """``network`` as it is now, in evaluation mode, without gradients.

    ``share_frozen`` copies only the parameters that are trained: where those are the cross-attentions of Stable
    Diffusion 1.5, a twentieth. Frozen parameters that a wrapper is going to cut into shards must not be shared.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared if share_frozen else {}).requires_grad_(False).eval()
