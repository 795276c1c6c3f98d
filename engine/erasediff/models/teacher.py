"""The frozen original of a network, for targets that it predicts and predictions that are to be preserved."""

from __future__ import annotations

import copy

from torch import nn


def frozen_copy(network: nn.Module, *, share_frozen: bool) -> nn.Module:
    """``network`` as it is now, in evaluation mode, without gradients.

    ``share_frozen`` copies only the parameters that are trained: where those are the cross-attentions of Stable
    Diffusion 1.5, a twentieth. Frozen parameters that a wrapper is going to cut into shards must not be shared.
    """
    shared = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    return copy.deepcopy(network, shared if share_frozen else {}).requires_grad_(False).eval()
