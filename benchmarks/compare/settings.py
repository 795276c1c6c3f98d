"""What each method is run with on the nano model, and how that was chosen: always on the sneaker, with seed 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fashion import CLASSES, TEMPLATES, prompt
from measure import CACHE

Settings = Mapping[str, Any]

ANCHORS = {"sneaker": "ankle boot", "ankle boot": "sneaker", "sandal": "sneaker", "dress": "coat", "trousers": "dress"}
"""What is drawn instead: a garment like it. For others, the next in the list of classes."""


def anchor(garment: str) -> str:
    following = CLASSES[(CLASSES.index(garment) + 1) % len(CLASSES)]
    return prompt(CLASSES.index(ANCHORS.get(garment, following)))


def of_images(garment: str, **settings: Any) -> Settings:
    """For methods that look at images; unless told otherwise cross-attention, in 100 steps of 64 of each kind."""
    common = {
        "threads": 1,
        "images.data": str(CACHE / "data"),
        "images.forget_classes": [garment],
        "images.bucket_step": None,
        "images.encode_batch_size": 100,
        "text_to_image.train": "xattn",
        "unlearn.batch_size": 64,
        "unlearn.steps": 100,
    }
    return common | {name.replace("__", "."): value for name, value in settings.items()}


def of_prompts(garment: str, **settings: Any) -> Settings:
    """For methods that need prompts alone: all four that the garment was trained under."""
    label = CLASSES.index(garment)
    common = {
        "threads": 1,
        "images.forget_prompts": [prompt(label, template) for template in range(len(TEMPLATES))],
        "text_to_image.train": "xattn",
        "unlearn.batch_size": 32,
        "esd.num_inference_steps": 25,
    }
    return common | {name.replace("__", "."): value for name, value in settings.items()}


METHODS: Mapping[str, Callable[[str], Settings]] = {
    # The sweep that nano_sd/README.md tells of: weights, eta and lr that forget all and keep 98%.
    "erasediff": lambda garment: of_images(
        garment,
        unlearn__target="relabel",
        text_to_image__anchor_prompts=[anchor(garment)],
        text_to_image__train="full",
        unlearn__eta=1.0,
        unlearn__lr=5e-4,
        unlearn__steps=150,
    ),
    # The same weights, anchor, learning rate and steps; its own mask, half of them, and a constant multiplier of 1.
    "salun": lambda garment: of_images(
        garment,
        unlearn__target="relabel",
        text_to_image__anchor_prompts=[anchor(garment)],
        text_to_image__train="full",
        salun__retain_weight=1.0,
        unlearn__lr=5e-4,
        unlearn__steps=150,
    ),
    # EraseDiff's weights and anchor. Of lr 1e-4 to 1e-3, 60 to 150 steps, xattn, xattn-kv and full, with the anchor and
    # without, what kept most of those that forgot all; with xattn at 3e-4 it kept 89%, without the anchor 84%.
    "esd": lambda garment: of_prompts(
        garment,
        text_to_image__train="full",
        esd__erase_from=anchor(garment),
        unlearn__lr=2e-4,
        unlearn__steps=150,
    ),
    # Scores begin at 3, and 60 steps at 0.05 prune nothing. Without the sparsity penalty, over 150 steps and with the
    # anchor, it forgot all and kept 30%: no setting that did both was found.
    "pruning": lambda garment: of_prompts(garment, unlearn__lr=0.1, unlearn__steps=100),
    # Not tuned.
    "selective-amnesia": lambda garment: of_images(garment, unlearn__lr=3e-4, selective_amnesia__fisher_batches=20),
    # Controls: nothing to forget; and ascent, at a fifth of the learning rate (at a twentieth, nothing was forgotten).
    "finetune": lambda garment: of_images(garment, unlearn__lr=5e-4),
    "neggrad": lambda garment: of_images(garment, unlearn__lr=1e-4),
}
