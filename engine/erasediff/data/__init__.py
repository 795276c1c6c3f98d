"""Data sets, forget and retain sets, the latent cache, and batches addressed by step."""

from erasediff.data.batch_order import Stream
from erasediff.data.batches import CachedBatches, GlobalBatches
from erasediff.data.cached_images import CachedImages
from erasediff.data.class_names import class_numbers
from erasediff.data.digits import ClassDataset, Images, load_digits
from erasediff.data.forget_split import (
    Partition,
    check_disjoint,
    check_disjoint_paths,
    forget_classes,
    forget_files,
    forget_phrases,
    forget_retain_split,
    partition,
    select_classes,
    select_files,
    select_phrases,
)
from erasediff.data.hf_datasets import read_images
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.latent_cache import LatentCache
from erasediff.data.preprocessing import Buckets
from erasediff.data.prompt_images import read_prompts, synthesise
from erasediff.data.sources import ImageSet, ReadOptions, read_image_set
from erasediff.data.torch_datasets import from_torch_dataset

__all__ = [
    "Buckets",
    "CachedBatches",
    "CachedImages",
    "CaptionedImage",
    "ClassDataset",
    "GlobalBatches",
    "ImageSet",
    "Images",
    "LatentCache",
    "Partition",
    "ReadOptions",
    "Stream",
    "check_disjoint",
    "check_disjoint_paths",
    "class_numbers",
    "forget_classes",
    "forget_files",
    "forget_phrases",
    "forget_retain_split",
    "from_torch_dataset",
    "load_digits",
    "partition",
    "read_image_set",
    "read_images",
    "read_prompts",
    "select_classes",
    "select_files",
    "select_phrases",
    "synthesise",
]
