"""Data sets as tensors or as captioned images, their split into forgotten and retained, and batches by step."""

from erasediff.data.batches import GlobalBatches
from erasediff.data.buckets import Buckets
from erasediff.data.cached_batches import CachedBatches
from erasediff.data.captions import CaptionedImage
from erasediff.data.digits import load_digits
from erasediff.data.images import ClassDataset, Images
from erasediff.data.latents import CachedImages, LatentCache
from erasediff.data.request import Partition, forget_classes, forget_files, forget_phrases
from erasediff.data.sources import read_images
from erasediff.data.split import check_disjoint, forget_retain_split
from erasediff.data.stream import Stream
from erasediff.data.synthesis import read_prompts, synthesise

__all__ = [
    "Buckets",
    "CachedBatches",
    "CachedImages",
    "CaptionedImage",
    "ClassDataset",
    "GlobalBatches",
    "Images",
    "LatentCache",
    "Partition",
    "Stream",
    "check_disjoint",
    "forget_classes",
    "forget_files",
    "forget_phrases",
    "forget_retain_split",
    "load_digits",
    "read_images",
    "read_prompts",
    "synthesise",
]
