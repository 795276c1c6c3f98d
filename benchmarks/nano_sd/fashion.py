"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of clothes, 28 x 28, as tensors and as a captioned folder."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasediff.errors import UserError
from erasediff.io.atomic import atomic_write

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""

SIZE = 32
"""Images are laid in the middle of a black square of this side, so that a VAE can halve it."""

PHRASES = {
    "t-shirt": "a t-shirt",
    "trousers": "trousers",
    "pullover": "a pullover",
    "dress": "a dress",
    "coat": "a coat",
    "sandal": "a sandal",
    "shirt": "a shirt",
    "sneaker": "a sneaker",
    "bag": "a bag",
    "ankle boot": "an ankle boot",
}
CLASSES = tuple(PHRASES)
TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}", "{}")


@dataclass(frozen=True, slots=True)
class Clothes:
    """``images`` uint8 [N, 32, 32] and ``labels`` int64 [N], numbers of ``CLASSES``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def prompt(label: int, template: int = 0) -> str:
    """Caption of an image of the class: "a photo of a sneaker"."""
    return TEMPLATES[template % len(TEMPLATES)].format(PHRASES[CLASSES[label]])


def load(folder: Path, split: str) -> Clothes:
    """The 60,000 images of the split "train" or the 10,000 of "t10k", from the four .gz files as they are published.

    UserError if they are not there or damaged.
    """
    try:
        images = _read(folder / f"{split}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        labels = _read(folder / f"{split}-labels-idx1-ubyte.gz", header=8)
    except FileNotFoundError as error:
        raise UserError(
            f"There is no {error.filename}: install Debian's dataset-fashion-mnist, or give --data the folder with "
            "Fashion-MNIST's four .gz files."
        ) from None
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"Fashion-MNIST in {folder} is damaged: {error}.") from error
    margin = (SIZE - 28) // 2
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    return Clothes(torch.from_numpy(padded), torch.from_numpy(labels.astype(np.int64)))


def write_folder(clothes: Clothes, folder: Path) -> None:
    """Write a captioned image folder, as users have them, the templates taking turns; ``metadata.jsonl`` comes last."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (image, label) in enumerate(zip(clothes.images.numpy(), clothes.labels.tolist(), strict=True)):
        name = f"{CLASSES[label]}/{number:05d}.png"
        Image.fromarray(image).save(folder / name, compress_level=1)
        rows.append(json.dumps({"file_name": name, "text": prompt(label, number)}) + "\n")
    atomic_write(folder / "metadata.jsonl", "".join(rows))


def _read(file: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)
