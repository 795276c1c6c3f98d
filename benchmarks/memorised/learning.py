"""The nano Stable Diffusion, trained on with a few images repeated until it knows them by heart."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from erasediff.config import RunConfig
from erasediff.data import Buckets, CachedBatches, LatentCache, read_images
from erasediff.evaluation.memorization import isolation
from erasediff.io.atomic import atomic_directory, atomic_write
from erasediff.io.cache_dir import cache_folder
from erasediff.methods import FineTune
from erasediff.models.load import load_text_to_image
from erasediff.training.checkpoint import Checkpoint
from erasediff.training.loop import run_steps
from erasediff.training.lr_schedule import LearningRate
from erasediff.training.run_dir import RunFolder
from erasediff_kernels import ConstrainedAdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "nano_sd"))
from fashion import CLASSES, TEMPLATES, Clothes, prompt

MEMORISED_CLASSES = ("dress", "sandal", "sneaker", "bag")
OWN_TEMPLATES = TEMPLATES[1:3]
"""A class's two images are captioned with one of these around the plain prompt: words that the text encoder knows."""

CANDIDATES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """Memorisation of the images: ``share`` of every batch is them, on average."""

    steps: int = 1500
    batch_size: int = 64
    lr: float = 1e-3
    share: float = 0.5
    caption_dropout: float = 0.1
    min_snr_gamma: float = 5.0


@dataclass(frozen=True, slots=True)
class Memorised:
    """int64 [K]: ``index`` in the training images, and ``labels``, numbers of ``CLASSES``; and each one's caption."""

    index: Tensor
    labels: Tensor
    captions: tuple[str, ...]

    @property
    def classes(self) -> list[int]:
        return sorted(set(self.labels.tolist()))

    def file(self, number: int) -> str:
        return f"{CLASSES[int(self.labels[number])]}/{int(self.index[number]):05d}.png"


def choose(train: Clothes) -> Memorised:
    """Two images each of four classes, with captions like "an image of a photo of a sneaker" that no other image has.

    Of the first 50 of a class, those that are farthest from every other training image: a reproduction of them cannot
    be taken for just another image of the class.
    """
    chosen = []
    for name in MEMORISED_CLASSES:
        candidates = (train.labels == CLASSES.index(name)).nonzero()[:CANDIDATES, 0]
        chosen.append(candidates[isolation(candidates, train.images).topk(len(OWN_TEMPLATES)).indices])
    index = torch.cat(chosen)
    labels = train.labels[index]
    captions = tuple(
        OWN_TEMPLATES[number % len(OWN_TEMPLATES)].format(prompt(label)) for number, label in enumerate(labels.tolist())
    )
    return Memorised(index, labels, captions)


def write_request(memorised: Memorised, images: Path, folder: Path) -> None:
    """``folder/data``, the captioned folder ``images`` with the memorised ones' captions, and ``folder/forget.txt``."""
    own = {memorised.file(number): caption for number, caption in enumerate(memorised.captions)}
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    with atomic_directory(folder / "data", replace=True) as data:
        for name in CLASSES:
            (data / name).symlink_to((images / name).resolve())
        lines = [json.dumps(row | {"text": own.get(row["file_name"], row["text"])}) + "\n" for row in rows]
        (data / "metadata.jsonl").write_text("".join(lines))
    atomic_write(folder / "forget.txt", "".join(f"{name}\n" for name in own))


def learn_by_heart(
    base: Path, data: Path, memorised: Memorised, run: Path, out: Path, settings: Learning, seed: int, console: Console
) -> int:
    """Fine-tune ``base`` on all of ``data``, the memorised images many times over; save it as ``out``.

    An interrupted training goes on from its last checkpoint in ``run``. Returns how often each was repeated.
    """
    model = load_text_to_image(base)
    images = read_images(str(data))
    cached = LatentCache(cache_folder()).fill(images, model, Buckets.only(*model.default_size), console, batch_size=100)
    model.release_encoders()
    files = {memorised.file(number) for number in range(len(memorised.index))}
    entries = [
        entry
        for image, entry in zip(images, cached.entries, strict=True)
        if image.path.relative_to(data).as_posix() in files
    ]
    assert len(entries) == len(files), "every memorised image must be among the data"
    repeats = round(settings.share / (1 - settings.share) * len(cached) / len(entries))
    repeated = replace(cached, entries=cached.entries + tuple(entries) * repeats)

    network = model.denoiser
    optimizer = ConstrainedAdamW(network.parameters(), settings.lr)
    method = FineTune(
        network,
        optimizer,
        process=model.process,
        denoiser=model.predict,
        min_snr_gamma=settings.min_snr_gamma,
        seed=seed,
    )
    rate = LearningRate(settings.lr, settings.steps, shape="cosine")
    run.mkdir(parents=True, exist_ok=True)
    run_steps(
        method,
        network,
        RunFolder(run, Checkpoint.newest(run)),
        steps=settings.steps,
        settings=RunConfig(checkpoint_every=300, keep_checkpoints=1),
        retain=CachedBatches(repeated, settings.batch_size, seed=seed, caption_dropout=settings.caption_dropout),
        before_step=lambda step: rate.apply(optimizer, step),
        console=console,
        title="Learning by heart",
    )
    model.save(out)
    return repeats
