"""Valid inputs that the targets change: models, LoRAs, data sets and a run."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helpers import run_command
from PIL import Image
from safetensors.torch import save_file
from shards import write_shard

from erasediff.models import lora
from erasediff.models.load import load_text_to_image
from erasediff.models.trainable import select

TINY_RUN = """
device: cpu
threads: 1
model: {block_out_channels: [8, 8], layers_per_block: 1}
train: {steps: 4, batch_size: 2}
run: {checkpoint_every: 1, keep_checkpoints: 3, log_every: 1}
"""


def make_loras(sd: Path, folder: Path) -> Path:
    """LoRA files of one block of nano SD: diffusers', kohya's, LyCORIS's products and a difference."""
    folder.mkdir()
    for keys in ("diffusers", "kohya"):
        model: Any = load_text_to_image(sd)
        lora.add(model.denoiser, rank=2, targets=select(model.denoiser, "re:down_blocks.*attn2"))
        with torch.no_grad():
            for name, parameter in model.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        lora.save(model.denoiser, folder / f"{keys}.safetensors", family="sd", keys=keys)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    ones = torch.ones
    save_file(
        {
            **{f"{layer}.hada_{part}": ones(16, 2) for part in ("w1_a", "w2_a")},
            **{f"{layer}.hada_{part}": ones(2, 16) for part in ("w1_b", "w2_b")},
            f"{layer}.alpha": torch.tensor(2.0),
        },
        folder / "loha.safetensors",
    )
    save_file({f"{layer}.lokr_w1": ones(4, 4), f"{layer}.lokr_w2": ones(4, 4)}, folder / "lokr.safetensors")
    save_file({f"{layer}.diff": ones(16, 16)}, folder / "diff.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "peft_type": "LORA"}))
    return folder


def make_single(sd: Path, path: Path) -> Path:
    """Nano SD as one file in the original layout."""
    model: Any = load_text_to_image(sd)
    model.save(path, layout="single-file")
    return path


def encoded(kind: str, mode: str = "RGB", side: int = 8) -> bytes:
    content = io.BytesIO()
    pixels = np.arange(side * side * 4, dtype=np.uint8).reshape(side, side, 4)
    Image.fromarray(pixels, "RGBA").convert(mode).save(content, kind)
    return content.getvalue()


PICTURES = {
    **{f"{mode.lower()}.png": encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1")},
    "a.jpg": encoded("JPEG"),
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "a.webp": encoded("WEBP"),
    "a.bmp": encoded("BMP"),
    "a.gif": encoded("GIF", "P"),
    "a.tif": encoded("TIFF"),
    "a.ppm": encoded("PPM"),
}


def make_images(folder: Path) -> Path:
    """An image folder: classes, captions beside images, metadata in both formats."""
    for number, (name, content) in enumerate(PICTURES.items()):
        path = folder / ("cat" if number % 2 else "dog") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    names = sorted(path.name for path in (folder / "cat").iterdir())
    rows = [{"file_name": name, "text": f"a cat {name}", "source": "web", "score": 0.5} for name in names]
    (folder / "cat/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = sorted(path.name for path in (folder / "dog").iterdir())
    (folder / "dog/metadata.csv").write_text("file_name,text\n" + "".join(f"{name},a dog\n" for name in names[:-1]))
    (folder / "dog" / names[-1]).with_suffix(".txt").write_text("a dog")
    return folder


def make_tables(folder: Path) -> Path:
    """The other formats: shards of webdataset, parquet, npz."""
    folder.mkdir()
    members = [
        member
        for number in range(3)
        for member in (
            (f"{number}.png", PICTURES["rgb.png"]),
            (f"{number}.txt", b"a cat"),
            (f"{number}.json", json.dumps({"class": "cat", "score": number}).encode()),
        )
    ]
    write_shard(folder / "shard.tar", members)
    write_shard(folder / "pax.tar", members, tarfile.PAX_FORMAT)
    pictures = [{"bytes": PICTURES["rgb.png"], "path": f"{number}.png"} for number in range(3)]
    pq.write_table(pa.table({"image": pictures, "text": ["a", "b", "c"], "label": [0, 1, 0]}), folder / "t.parquet")
    arrays: dict[str, Any] = {"images": np.zeros((3, 4, 4, 3), np.uint8), "labels": np.arange(3)}
    np.savez(folder / "a.npz", **arrays)
    np.savez_compressed(folder / "b.npz", **arrays)
    return folder


def make_run(folder: Path) -> Path:
    """A finished training run with its checkpoints, and its settings beside it."""
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY_RUN)
    assert run_command("train", "--config", folder / "tiny.yaml", "--out", folder / "run") == 0
    return folder


@contextmanager
def copy_of(source: Path) -> Iterator[Path]:
    """A copy of a file or folder in the current folder within the block: hard links, never to be written through."""
    target = Path(source.name)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)
    try:
        yield target
    finally:
        if target.is_symlink() or not target.is_dir():
            target.unlink(missing_ok=True)
        else:
            shutil.rmtree(target)
