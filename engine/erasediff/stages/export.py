"""A model whose weights are spread over ranks, whole again where it is written."""

from torch import Tensor, nn

from erasediff.gradients import Gradients, averaged_weights, full_weights


def averaged_whole(trained: nn.Module, gradients: Gradients) -> dict[str, Tensor]:
    """The averaged weights of ``trained`` by name, on the main rank's host; nothing on the others.

    Every rank must call it; they are gathered one at a time.
    """
    with averaged_weights(gradients):
        return {name: tensor for name, tensor in full_weights(trained) if tensor is not None}


def made_whole(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` in the place of what ``network`` has of them, which can then be saved, but not trained."""
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
