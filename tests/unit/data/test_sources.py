"""Every format of data sets yields the pixels, classes and names that were put in, and damage is one sentence."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from erasediff.data import Buckets, CachedBatches, ImageSet, LatentCache, ReadOptions, class_numbers, from_torch_dataset
from erasediff.data import read_image_set as read
from erasediff.data.preprocessing import open_picture
from erasediff.data.survey import BrokenImagePolicy, survey
from erasediff.errors import UserError
from erasediff.models import PixelModel

QUIET = Console(quiet=True)
OPTIONS, TEST = ReadOptions(), ReadOptions(split="test")
LABELS = [2, 0, 1, 2]
NAMES = ("ant", "bee", "cow")
Pixels = NDArray[np.uint8]


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def pixels_of(found: ImageSet) -> Pixels:
    """[N, H, W, 3] as training reads them."""
    return np.stack([np.array(open_picture(image.read(), "x")) for image in found.images])


def labels_of(found: ImageSet) -> list[int | None]:
    return [image.label for image in found.images]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1"), ("test_images", "test_labels")])
def test_npz(tmp_path: Path, save: Callable[..., None], names: tuple[str, str]) -> None:
    images = noise(4, 5, 6, 3)
    save(tmp_path / "data.npz", **{names[0]: images, names[1]: np.array(LABELS)})
    found = read(str(tmp_path / "data.npz"), TEST)
    assert (pixels_of(found) == images).all()
    assert (labels_of(found), found.class_names) == (LABELS, ("0", "1", "2"))


def test_a_model_with_prompts_has_captions_of_the_template(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=noise(4, 5, 6, 3), labels=np.array(LABELS), class_names=np.array(NAMES))
    found = read(str(tmp_path / "data.npz"), ReadOptions(captions=True, template="a photo of a {class}"))
    assert [image.caption for image in found.images][:2] == ["a photo of a cow", "a photo of a ant"]
    with pytest.raises(UserError, match="give a caption template"):
        read(str(tmp_path / "data.npz"), ReadOptions(captions=True))


def test_npz_whose_labels_number_no_classes(tmp_path: Path) -> None:
    """Names for as many classes would take all memory."""
    np.savez(tmp_path / "data.npz", images=noise(2, 3, 3), labels=np.array([0, 10**12]))
    with pytest.raises(UserError, match="has a label of 1,000,000,000,000"):
        read(str(tmp_path / "data.npz"), OPTIONS)


def test_npz_with_a_byte_changed(tmp_path: Path) -> None:
    """Its bits, its kind of compression, its flags, the header of its array: read or refused, and nothing else."""
    np.savez_compressed(tmp_path / "data.npz", images=noise(2, 3, 3))
    content = (tmp_path / "data.npz").read_bytes()
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        (tmp_path / "data.npz").write_bytes(changed)
        try:
            read(str(tmp_path / "data.npz"), OPTIONS)
        except UserError:
            refused += 1
    assert refused > 100


def test_npz_of_other_shapes(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    grey = noise(4, 5, 6)
    for stored in (grey, grey[..., None], np.asfortranarray(grey)):
        np.savez(file, images=stored)
        found = read(str(file), OPTIONS)
        assert (pixels_of(found) == grey[..., None]).all()
        assert (labels_of(found), found.class_names) == ([None] * 4, ())
    images = noise(4, 5, 6, 3)
    np.savez(file, images=images.transpose(0, 3, 1, 2), labels=np.array(LABELS)[:, None], class_names=np.array(NAMES))
    found = read(str(file), OPTIONS)
    assert (pixels_of(found) == images).all()
    assert (labels_of(found), found.class_names) == (LABELS, NAMES)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"pictures": noise(4, 5, 6)}, "has no array images or arr_0: it has pictures"),
        ({"images": noise(4, 5, 6).astype(np.float32)}, "store uint8"),
        ({"images": noise(4, 5, 6, 2)}, "neither 1 nor 3 channels"),
        ({"images": noise(4, 5, 6), "labels": np.arange(3)}, "one for each of 4 images"),
        ({"images": noise(4, 5, 6), "labels": np.array([0, 1, 2, -1])}, "labels outside of 0 to 2"),
        ({"images": np.array([object()], dtype=object)}, "plain arrays"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError, match=said):
        read(str(tmp_path / "data.npz"), OPTIONS)


CIFAR_10 = tuple(f"kind {number}".replace(" ", "_") for number in range(10))


def cifar_10_binary(root: Path) -> tuple[Pixels, list[int]]:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    images, labels = noise(10, 3, 32, 32), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for number in range(5):
        two = range(2 * number, 2 * number + 2)
        content = b"".join(bytes([labels[index]]) + images[index].tobytes() for index in two)
        (folder / f"data_batch_{number + 1}.bin").write_bytes(content)
    (folder / "test_batch.bin").write_bytes(bytes([7]) + images[0].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR_10) + "\n\n")
    return images, labels


def cifar_10_python(root: Path) -> tuple[Pixels, list[int]]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = noise(10, 3, 32, 32), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for number in range(5):
        two = slice(2 * number, 2 * number + 2)
        content = {b"data": images[two].reshape(2, -1), b"labels": labels[two], b"batch_label": b"training batch"}
        (folder / f"data_batch_{number + 1}").write_bytes(pickle.dumps(content, protocol=2))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": images[:1].reshape(1, -1), b"labels": [7]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in CIFAR_10]}))
    return images, labels


@pytest.mark.parametrize("archive", [cifar_10_binary, cifar_10_python])
def test_cifar_10(tmp_path: Path, archive: Callable[[Path], tuple[Pixels, list[int]]]) -> None:
    images, labels = archive(tmp_path)
    for location in (tmp_path, next(tmp_path.iterdir())):
        found = read(str(location), OPTIONS)
        assert (pixels_of(found) == images.transpose(0, 2, 3, 1)).all()
        assert (labels_of(found), found.class_names) == (labels, CIFAR_10)
        assert labels_of(read(str(location), TEST)) == [7]
    with pytest.raises(UserError, match="no split 'valid': choose from train, test"):
        read(str(tmp_path), ReadOptions(split="valid"))


def test_cifar_100_has_its_fine_classes(tmp_path: Path) -> None:
    images, names = noise(2, 3, 32, 32), [f"fine{number}" for number in range(100)]
    binary, python = tmp_path / "cifar-100-binary", tmp_path / "python"
    binary.mkdir()
    records = b"".join(bytes([1, label]) + image.tobytes() for label, image in zip((42, 99), images, strict=True))
    (binary / "train.bin").write_bytes(records)
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    python.mkdir()
    content = {b"data": images.reshape(2, -1), b"fine_labels": [42, 99], b"coarse_labels": [1, 1]}
    (python / "train").write_bytes(pickle.dumps(content))
    (python / "meta").write_bytes(pickle.dumps({b"fine_label_names": [name.encode() for name in names]}))
    for location in (tmp_path, python):
        found = read(str(location), OPTIONS)
        assert (pixels_of(found) == images.transpose(0, 2, 3, 1)).all()
        assert [image.attributes["class"] for image in found.images] == ["fine42", "fine99"]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("code ran",)


@pytest.mark.parametrize("content", [pickle.dumps({b"data": Evil()}), b"\x80\x02", b"plain text", pickle.dumps([1])])
def test_a_pickle_that_names_code_is_refused(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar_10_python(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3 is no file of CIFAR"):
        read(str(tmp_path), OPTIONS)
    assert "code ran" not in capsys.readouterr().out


def test_stl_10(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = noise(3, 96, 96, 3)
    for split in ("train", "unlabeled"):
        (folder / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
    (folder / "train_y.bin").write_bytes(bytes([3, 1, 2]))
    (folder / "class_names.txt").write_text("ant\nbee\ncow\n")
    found = read(str(tmp_path), OPTIONS)
    assert (pixels_of(found) == images).all()
    assert (labels_of(found), found.class_names) == ([2, 0, 1], NAMES)
    assert labels_of(read(str(folder), ReadOptions(split="unlabeled"))) == [None] * 3


def folder_of(root: Path, classes: list[str]) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(4, 4, 3)).save(root / name / f"{number:02d}.png")
    return root


def test_folders_are_numbered_as_by_torchvision(tmp_path: Path) -> None:
    found = read(str(folder_of(tmp_path, ["bee", "ant", "cow"])), OPTIONS)
    assert [(image.path.parent.name, image.label) for image in found.images] == [("ant", 0), ("bee", 1), ("cow", 2)]
    numbers = read(str(folder_of(tmp_path / "numbers", ["10", "2", "0"])), OPTIONS)
    assert numbers.class_names == ("0", "10", "2")


def test_whole_numbers_in_metadata_are_the_classes_own(tmp_path: Path) -> None:
    folder_of(tmp_path, ["x"] * 3)
    rows = "".join(f'{{"file_name": "x/{number:02d}.png", "kind": {kind}}}\n' for number, kind in enumerate((10, 2, 0)))
    (tmp_path / "metadata.jsonl").write_text(rows)
    found = read(str(tmp_path), ReadOptions(class_column="kind"))
    assert labels_of(found) == [10, 2, 0]
    assert len(found.class_names) == 11


def test_class_labels_of_a_saved_dataset_keep_their_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(picture) for picture in noise(3, 4, 4, 3)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cow", "ant", "bee"])})
    datasets.Dataset.from_dict({"image": images, "label": [1, 0, 0]}, features=features).save_to_disk(
        tmp_path / "saved"
    )
    found = read(str(tmp_path / "saved"), OPTIONS)
    assert (labels_of(found), found.class_names) == ([1, 0, 0], ("cow", "ant", "bee"))
    assert (pixels_of(found) == noise(3, 4, 4, 3)).all()


@pytest.mark.parametrize("kind", ["PIL", "uint8 tensor", "float tensor", "dict", "image alone"])
def test_a_torch_dataset(kind: str) -> None:
    images = noise(4, 5, 6, 3)
    tensors = torch.from_numpy(images).movedim(-1, 1)
    items: dict[str, list[Any]] = {
        "PIL": [(Image.fromarray(image), label) for image, label in zip(images, LABELS, strict=True)],
        "uint8 tensor": list(zip(tensors, LABELS, strict=True)),
        "float tensor": list(zip(tensors / 255, LABELS, strict=True)),
        "dict": [{"image": image, "label": label} for image, label in zip(images, LABELS, strict=True)],
        "image alone": list(tensors),
    }
    found = from_torch_dataset(items[kind], class_names=NAMES)
    assert (pixels_of(found) == images).all()
    assert labels_of(found) == ([None] * 4 if kind == "image alone" else LABELS)


def test_a_class_is_named_first_and_numbered_second() -> None:
    assert class_numbers(["bee", "0", 2, "bee"], NAMES) == (1, 0, 2)
    assert class_numbers(["2"], ["0", "10", "2"]) == (2,)
    assert class_numbers(["1"], ["0", "10", "2"]) == (1,)
    with pytest.raises(UserError, match="There is no class Bea in the data: choose from bee"):
        class_numbers(["Bea"], NAMES)
    with pytest.raises(
        UserError, match=r"no class ant,bee in the data: .*; to name several, give the flag once for each"
    ):
        class_numbers(["ant,bee"], NAMES)
    with pytest.raises(UserError, match="choose from ant, bee, cow"):
        class_numbers([3], NAMES)
    with pytest.raises(UserError, match="no class bee in the data, since there are none"):
        class_numbers(["bee"], ())


@pytest.mark.parametrize("channels", [1, 3])
def test_cached_pixels_are_those_of_the_data_scaled(tmp_path: Path, channels: int) -> None:
    images = noise(4, 8, 8, channels)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array(LABELS))
    found = read(str(tmp_path / "data.npz"), OPTIONS)
    model = PixelModel.build(num_classes=3, image_shape=(channels, 8, 8), block_out_channels=(8, 8))
    broken = BrokenImagePolicy(QUIET, skip=False)
    cache = LatentCache(tmp_path / "cache")
    records = survey(found.images, Buckets.only(8, 8), broken, QUIET)
    cached = cache.encode_unprompted(records, model, broken, QUIET, labelled=True, null_label=3)
    assert cached.row(cached.entries[0])["sample"].dtype == torch.uint8
    batch = CachedBatches(cached, 4, seed=0).at(0)
    expected = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    order = [LABELS.index(label) if label != 2 else None for label in batch["class_labels"].tolist()]
    for place, index in enumerate(order):
        if index is not None:
            assert torch.equal(batch["sample"][place], expected[index])
    dropped = torch.cat(
        [CachedBatches(cached, 4, seed=0, caption_dropout=0.5).at(step)["class_labels"] for step in range(50)]
    )
    assert 0.3 < (dropped == 3).double().mean() < 0.7
