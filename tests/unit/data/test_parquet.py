"""Parquet files list every image with its captions, class and attributes, and decode each row group once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shards import png, write_shard

from erasediff.data import ReadOptions, forget_files, read_image_set
from erasediff.errors import UserError

PLAIN, CAPTIONED = ReadOptions(), ReadOptions(captions=True)
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "score": datasets.Value("float32"),
    }
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))


def hugging_face(path: Path, paths: list[str | None], labels: list[int | None], per_group: int = 2) -> Path:
    count = len(paths)
    rows = {
        "image": [{"bytes": png(number), "path": name} for number, name in enumerate(paths)],
        "text": [f"photo {number}" for number in range(count)],
        "label": labels,
        "score": [number / 2 for number in range(count)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(path, batch_size=per_group)
    return path


def plain(path: Path, per_group: int = 2, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=per_group)
    return path


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    hugging_face(tmp_path / "data/train-00000-of-00002.parquet", ["cat/1.png", "dog/2.png", None], [0, 1, 0])
    hugging_face(tmp_path / "data/train-00001-of-00002.parquet", ["/a/../dog/9.png"], [None])
    hugging_face(tmp_path / "data/test-00000-of-00001.parquet", ["t.png"], [1])
    found = read_image_set(str(tmp_path), CAPTIONED)
    assert [image.path.relative_to(tmp_path / "data").as_posix() for image in found.images] == [
        "train-00000-of-00002.parquet/cat/1.png",
        "train-00000-of-00002.parquet/dog/2.png",
        "train-00000-of-00002.parquet/00002",
        "train-00001-of-00002.parquet/a/dog/9.png",
    ]
    assert [image.read() for image in found.images] == [png(0), png(1), png(2), png(0)]
    assert [image.caption for image in found.images] == ["photo 0", "photo 1", "photo 2", "photo 0"]
    assert (found.class_names, [image.label for image in found.images]) == (("cat", "dog"), [0, 1, 0, None])
    assert dict(found.images[1].attributes) == {"class": "dog", "label": "dog", "score": "0.5"}
    assert len(read_image_set(str(tmp_path), ReadOptions(split="test")).images) == 1
    with pytest.raises(UserError, match="has no split 'validation': choose from test, train"):
        read_image_set(str(tmp_path), ReadOptions(split="validation"))


def test_binary_columns_numbers_and_lists_of_captions(tmp_path: Path) -> None:
    images, captions = [png(number) for number in range(3)], [["a", None, "b"], ["c"], ["d"]]
    file = plain(tmp_path / "x.parquet", jpg=images, thumbnail=images[::-1], caption=captions, label=[2, 0, 2])
    found = read_image_set(str(file), CAPTIONED)
    assert [image.read() for image in found.images] == images
    assert [list(image.captions()) for image in found.images] == [["a", "b"], ["c"], ["d"]]
    assert (found.class_names, [image.label for image in found.images]) == (("0", "1", "2"), [2, 0, 2])
    by_name = plain(tmp_path / "y.parquet", image=images, kind=pa.array(["b", "a", "b"]).dictionary_encode())
    found = read_image_set(str(by_name), ReadOptions(class_column="kind"))
    assert (found.class_names, [image.label for image in found.images]) == (("a", "b"), [1, 0, 1])
    assert len(read_image_set(str(plain(tmp_path / "z.parquet", image=images)), PLAIN).images) == 3


def test_a_missing_caption_is_named_or_filled(tmp_path: Path) -> None:
    file = plain(tmp_path / "x.parquet", image=[png(0), png(1), png(2)], text=["a", None, " "], kind=["u", "v", "w"])
    with pytest.raises(UserError, match=r"x.parquet/00001 and 1 more have no caption: name the column"):
        read_image_set(str(file), CAPTIONED)
    filled = read_image_set(str(file), ReadOptions(captions=True, template="kind {kind}")).images
    assert [image.caption for image in filled] == ["a", "kind v", "kind w"]
    with pytest.raises(UserError, match="no column 'title' with captions: choose from"):
        read_image_set(str(file), ReadOptions(captions=True, caption_column="title"))


def test_files_to_forget_by_path_field(tmp_path: Path) -> None:
    hugging_face(tmp_path / "x.parquet", ["cat/1.png", "/once/2.png", "same.png", "same.png"], [0, 0, 0, 0])
    images = read_image_set(str(tmp_path), CAPTIONED).images

    def forgotten(*lines: str) -> list[int]:
        (tmp_path / "request").write_text("\n".join(lines))
        return [image.id for image in forget_files(images, tmp_path / "request").forget]

    assert forgotten("cat/1.png", "2.png") == [0, 1]
    assert forgotten("x.parquet/once/2.png", "00003/same.png") == [1, 3]
    assert forgotten("/once/2.png") == [1]
    assert forgotten(r"\cat\1.png") == [0]
    with pytest.raises(UserError, match=r"same.png may be any of 2 images"):
        forgotten("same.png")


def test_each_row_group_is_decoded_once_and_two_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erasediff.data.sources.parquet_images.HELD_BYTES", 0)
    for number in range(2):
        hugging_face(tmp_path / f"{number}.parquet", [None] * 5, [0] * 5)
    images = read_image_set(str(tmp_path), PLAIN).images
    decoded: list[tuple[int, list[str]]] = []
    real = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, columns: list[str], **options: Any) -> Any:
        decoded.append((group, columns))
        return real(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    # A little out of order, as threads read.
    for number in (1, 2, 0, 3, 4, 5, 7, 6, 8, 9):
        assert images[number].read() == png(number % 5)
        assert len(images._read._held) <= 2  # type: ignore[attr-defined]
    assert decoded == [(group, ["image.bytes"]) for _ in range(2) for group in range(3)]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [png(0), None, None]}, "without the bytes of an image, 2 in all, from 0: 1, 2;"),
        ({"image": [{"bytes": png(0), "path": "a"}, {"bytes": None, "path": "https://host/1.png"}]}, "from 0: 1;"),
        ({"image": ["https://host/1.png"]}, "the column image holds addresses or names of images, which are not"),
        ({"url": ["https://host/1.png"], "text": ["a"]}, "the column url holds addresses"),
        ({"text": ["a"]}, "no column of images: it has text"),
        ({"image": [png(0)], "text": [["a", "b"]], "caption": [3]}, None),
        ({"image": [png(0)], "caption": [3]}, "row 0: caption is 3: a caption is a text"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, columns: dict[str, Any], said: str | None) -> None:
    file = str(plain(tmp_path / "x.parquet", **columns))
    if said is None:
        assert len(read_image_set(file, CAPTIONED).images) == 1
    else:
        with pytest.raises(UserError, match=said):
            read_image_set(file, CAPTIONED)


def test_damaged_and_different_files_are_named(tmp_path: Path) -> None:
    hugging_face(tmp_path / "a.parquet", ["1.png"], [0])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"b.parquet cannot be read as parquet: .*[^.]\.$"):
        read_image_set(str(tmp_path), PLAIN)
    plain(tmp_path / "b.parquet", image=[png(0)], label=[1])
    with pytest.raises(UserError, match=r"b.parquet has other images or classes than .*a.parquet"):
        read_image_set(str(tmp_path), PLAIN)
    with pytest.raises(UserError, match=r"There is no file .*c.parquet"):
        read_image_set(str(tmp_path / "c.parquet"), PLAIN)
    with pytest.raises(UserError, match="nothing is downloaded"):
        read_image_set("hf://datasets/a/b/c.parquet", PLAIN)


def test_a_table_that_describes_shards_is_not_taken_for_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", [("1.png", png(1))])
    plain(tmp_path / "00000.parquet", url=["https://host/1.png"])
    assert [image.read() for image in read_image_set(str(tmp_path), PLAIN).images] == [png(1)]
