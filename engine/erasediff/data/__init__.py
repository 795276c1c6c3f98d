"""Data sets as tensors, their split into forgotten and retained, and batches addressed by step."""

from erasediff.data.batches import GlobalBatches, Stream
from erasediff.data.digits import load_digits
from erasediff.data.images import ClassDataset, Images
from erasediff.data.split import check_disjoint, forget_retain_split

__all__ = [
    "ClassDataset",
    "GlobalBatches",
    "Images",
    "Stream",
    "check_disjoint",
    "forget_retain_split",
    "load_digits",
]
