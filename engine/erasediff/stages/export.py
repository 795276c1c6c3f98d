"""A model whose weights are spread over ranks, whole again where it is written."""

import os
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor, nn

from erasediff.gradients import Gradients, averaged_weights, full_weights
from erasediff.models.tensor_file import ALIGNMENT, tensor_bytes
from erasediff.runs.atomic import storage_errors


def averaged_whole(trained: nn.Module, gradients: Gradients, folder: Path) -> dict[str, Tensor]:
    """The averaged weights of ``trained`` by name, on the main rank; nothing on the others.

    Every rank must call it. The weights are gathered one at a time, each into a file without a name in ``folder``, and
    what is returned are views of that file: the main rank needs the disk for a whole model, not the memory. UserError
    if the disk is full.
    """
    places: dict[str, tuple[slice, torch.dtype, torch.Size]] = {}
    with storage_errors(folder), TemporaryFile(dir=folder) as file:
        with averaged_weights(gradients):
            for name, tensor in full_weights(trained):
                if tensor is not None:
                    begin = file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                    places[name] = slice(begin, begin + tensor.nbytes), tensor.dtype, tensor.shape
                    file.write(tensor_bytes(tensor))
                del tensor  # before the next is gathered
        file.flush()
        if not places:
            return {}
        # The mapping outlives the file's only name; what is written to the views stays in memory.
        whole = torch.frombuffer(mmap(file.fileno(), 0, access=ACCESS_COPY), dtype=torch.uint8)
    return {name: whole[place].view(dtype).view(shape) for name, (place, dtype, shape) in places.items()}


def made_whole(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put ``weights`` in the place of what ``network`` has of them, which can then be saved, but not trained."""
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[leaf] = tensor
