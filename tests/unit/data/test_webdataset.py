"""Shards list every image with its caption, class and attributes, and whatever is wrong with one is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from shards import Members, add, png, write_shard

from erasediff.data import ReadOptions, forget_classes, forget_files, forget_phrases, read_image_set
from erasediff.data.sources.webdataset import expand_braces
from erasediff.errors import UserError

PLAIN, CAPTIONED = ReadOptions(), ReadOptions(captions=True)
LAYOUTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERASEDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def captioned(count: int = 3, first: int = 0) -> Members:
    for number in range(first, first + count):
        yield f"{number:03d}.png", png(number)
        yield f"{number:03d}.txt", f"a photo of number {number}\n".encode()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_captions_classes_and_attributes(tmp_path: Path, layout: int) -> None:
    members = [
        ("./b/1.PNG", png(1)),
        ("./b/1.txt", b"\xef\xbb\xbfa red bee "),
        ("./b/1.cls", b"bee\n"),
        ("./b/1.json", b'{"source": "web", "score": 0.5, "licence": null}'),
        ("a.jpg.txt", b"another"),
        ("a.caption", b"third"),
        ("a.jpg", png(2)),
        ("a.seg.npy", b"extra"),
        ("._a.jpg", b"resource fork"),
        ("c.webp", png(3)),
        ("c.json", json.dumps({"text": ["first", None, "second"], "class": "cow"}).encode()),
        ("c.txt", b"not this one"),
    ]
    found = read_image_set(str(write_shard(tmp_path / "x.tar", members, layout)), CAPTIONED)
    assert [image.path.relative_to(tmp_path).as_posix() for image in found.images] == [
        "x.tar/b/1.PNG",
        "x.tar/a.jpg",
        "x.tar/c.webp",
    ]
    assert [image.read() for image in found.images] == [png(1), png(2), png(3)]
    assert [list(image.captions()) for image in found.images] == [
        ["a red bee"],
        ["another", "third"],
        ["first", "second"],
    ]
    assert [dict(image.attributes) for image in found.images] == [
        {"class": "bee", "source": "web", "score": "0.5"},
        {},
        {"class": "cow"},
    ]
    assert (found.class_names, [image.label for image in found.images]) == (("bee", "cow"), [0, None, 1])


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, layout: int) -> None:
    name = f"{'folder/' * 30}{'ü' * 90}.png"
    write_shard(tmp_path / "x.tar", [(name, png(1)), ("short.png", png(2))], layout)
    images = read_image_set(str(tmp_path / "x.tar"), PLAIN).images
    assert [str(image.path.relative_to(tmp_path / "x.tar")) for image in images] == [name, "short.png"]
    assert [image.read() for image in images] == [png(1), png(2)]


def test_shards_of_the_webdataset_package(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number in range(3):
            writer.write({"__key__": f"{number:03d}", "png": png(number), "txt": f"number {number}", "cls": number})
    found = read_image_set(str(tmp_path / "x.tar"), CAPTIONED)
    assert [image.read() for image in found.images] == [png(number) for number in range(3)]
    assert [(image.caption, image.label) for image in found.images] == [(f"number {n}", n) for n in range(3)]


def test_folders_are_classes_and_numbers_are_their_own(tmp_path: Path) -> None:
    write_shard(tmp_path / "folders.tar", [(f"{name}/1.png", png(1)) for name in ("10", "9", "9/8")])
    found = read_image_set(str(tmp_path / "folders.tar"), PLAIN)
    assert (found.class_names, [image.label for image in found.images]) == (("10", "9", "9/8"), [0, 1, 2])
    assert len(forget_classes(found.images, ["9"]).forget) == 2
    write_shard(tmp_path / "numbers.tar", [("a.png", png(1)), ("a.cls", b"3"), ("b.png", png(2)), ("b.cls", b"1")])
    found = read_image_set(str(tmp_path / "numbers.tar"), PLAIN)
    assert (found.class_names, [image.label for image in found.images]) == (("0", "1", "2", "3"), [3, 1])


def test_folders_braces_and_splits_name_shards(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"data/train-{number:02d}.tar", captioned(2, 2 * number))
    write_shard(tmp_path / "data/val-00.tar", captioned(1, 9))
    (tmp_path / "data/train-00.parquet").write_bytes(b"what a crawler knows of the shard beside it")

    def numbers(location: str, split: str = "train") -> list[str]:
        return [image.path.stem for image in read_image_set(str(tmp_path / location), ReadOptions(split=split)).images]

    assert numbers("data") == ["000", "001", "002", "003", "004", "005"]
    assert numbers("data", "validation") == ["009"]
    assert numbers("data/train-{01..02}.tar") == ["002", "003", "004", "005"]
    assert numbers("data/{val-00,train-00}.tar") == ["009", "000", "001"]
    with pytest.raises(UserError, match="has no split 'test': choose from train, validation"):
        numbers("data", "test")
    with pytest.raises(UserError, match=r"no shard .*train-03.tar, and 1 more of 5 are missing"):
        numbers("data/train-{00..04}.tar")
    with pytest.raises(UserError, match=r"names .*train-00.tar twice"):
        numbers("data/train-{00,00}.tar")


def test_braces() -> None:
    assert expand_braces("{a,b}-{08..10}.tar") == [f"{a}-{n}.tar" for a in "ab" for n in ("08", "09", "10")]
    for pattern in ("{5..3}.tar", "{0..999999999}.tar", "{0..9999}{0..9999}.tar", "{x}.tar"):
        with pytest.raises(UserError):
            expand_braces(pattern)


def test_a_folder_of_images_with_an_archive_among_them_is_an_image_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "backup.tar", captioned())
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(png(1))
    assert [image.path.name for image in read_image_set(str(tmp_path), PLAIN).images] == ["1.png"]


def test_captions_by_template_where_there_are_none(tmp_path: Path) -> None:
    location = str(write_shard(tmp_path / "x.tar", [*captioned(1), ("cat/5.png", png(5)), ("cat/6.png", png(6))]))
    with pytest.raises(UserError, match=r"x.tar/cat/5.png and 1 more have no caption: give its key a .txt member"):
        read_image_set(location, CAPTIONED)
    filled = read_image_set(location, ReadOptions(captions=True, template="a thing")).images
    assert [image.caption for image in filled] == ["a photo of number 0", "a thing", "a thing"]
    with pytest.raises(UserError, match="has no column 'title' with captions"):
        read_image_set(location, ReadOptions(captions=True, caption_column="title"))


def test_what_is_forgotten(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [*captioned(2, 2 * number), ("same.png", png(7)), ("same.txt", b"x")])
    images = read_image_set(str(tmp_path), CAPTIONED).images

    def forgotten(*lines: str) -> list[str]:
        (tmp_path / "request").write_text("\n".join(lines))
        partition = forget_files(images, tmp_path / "request")
        assert len(partition.forget) + len(partition.retain) == len(images)
        assert not {image.id for image in partition.forget} & {image.id for image in partition.retain}
        return [image.path.relative_to(tmp_path).as_posix() for image in partition.forget]

    assert forgotten("0.tar/001.png", "003") == ["0.tar/001.png", "1.tar/003.png"]
    assert forgotten("1.tar/same", str(tmp_path / "0.tar/000.png")) == ["0.tar/000.png", "1.tar/same.png"]
    with pytest.raises(UserError, match="same may be any of 2 images"):
        forgotten("same")
    with pytest.raises(UserError, match=r"004.png is no image of the data"):
        forgotten("004.png")
    by_phrase = forget_phrases(images, ["number 2"])
    assert [image.path.name for image in by_phrase.forget] == ["002.png"]
    assert by_phrase.forget[0].selected_by == (("phrase", "number 2"),)
    assert [image.path.name for image in by_phrase.retain] == [
        "000.png",
        "001.png",
        "same.png",
        "003.png",
        "same.png",
    ]


def test_an_index_is_kept_until_the_shard_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "x.tar", captioned())
    before = [image.caption for image in read_image_set(str(shard), CAPTIONED).images]
    with monkeypatch.context() as patched:
        patched.setattr("erasediff.data.sources.shard_index.TarScan", None)
        images = read_image_set(str(shard), CAPTIONED).images
        assert [image.caption for image in images] == before
        assert images[2].read() == png(2)
    write_shard(shard, captioned(5))
    assert len(read_image_set(str(shard), CAPTIONED).images) == 5
    assert len(list((cache / "shards").iterdir())) == 2


def test_descriptions_of_many_images_are_kept_for_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptions = "erasediff.data.sources.descriptions"
    monkeypatch.setattr(f"{descriptions}.CACHED_FROM", 2)
    shard = write_shard(tmp_path / "x.tar", [*captioned(), ("b/1.png", png(9))])
    template = ReadOptions(captions=True, template="a {class}")
    first = read_image_set(str(shard), template)
    assert [image.caption for image in first.images][2:] == ["a photo of number 2", "a b"]
    with monkeypatch.context() as patched:
        patched.setattr(f"{descriptions}.Descriptions", None)
        again = read_image_set(str(shard), template)
        assert [(i.path, i.caption, i.label, i.attributes, i.read()) for i in again.images] == [
            (i.path, i.caption, i.label, i.attributes, i.read()) for i in first.images
        ]
        assert again.class_names == first.class_names == ("b",)
    with pytest.raises(UserError, match=r"b/1.png has no caption"):
        read_image_set(str(shard), CAPTIONED)
    assert read_image_set(str(shard), ReadOptions(captions=True, template="one")).images[3].caption == "one"
    write_shard(shard, captioned(5))
    assert len(read_image_set(str(shard), template).images) == 5


def cut(shard: Path) -> None:
    os.truncate(shard, 1200)


def cut_between_members(shard: Path) -> None:
    os.truncate(shard, 2048)


def damaged(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[1024 + 10] ^= 1
    shard.write_bytes(content)


def joined(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() * 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "cut short"),
        (cut_between_members, "cut short"),
        (damaged, "damaged at byte 1,024"),
        (joined, "goes on behind its end mark"),
        (lambda shard: shard.write_bytes(b""), "cut short"),
        (lambda shard: shard.write_bytes(b"\x1f\x8b" + bytes(600)), r"compressed \(gzip\)"),
        (lambda shard: shard.write_bytes(bytes(1024)), "no images"),
        (lambda shard: shard.rename(shard.with_suffix(".tar.gz")), "no shard"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    shard = write_shard(tmp_path / "x.tar", captioned())
    change(shard)
    with pytest.raises(UserError, match=said):
        read_image_set(str(shard), PLAIN)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("1.txt", b"a"), ("1.json", b"{}")], "the key 1 has no image, only 1.txt, 1.json"),
        ([("1.png", b"a"), ("1.png", b"b")], "the member 1.png twice"),
        ([("1.png", b"a"), ("1.seg.png", b"b")], "several images, 1.png and 1.seg.png"),
        ([("1.psd", b"a")], "1.psd cannot be read as an image here: convert it to PNG"),
        ([("../1.png", b"a")], r"'../1.png', a name that leads out of it"),
        ([("/1.png", b"a")], r"'/1.png', a name that leads out of it"),
        ([("1.png", b"a"), ("1.txt", b"\xff\xfe")], "1.txt is not UTF-8"),
        ([("1.png", b"a"), ("1.json", b"{")], "the .json of 1.png cannot be read: it is not JSON"),
        ([("1.png", b"a"), ("1.json", b"[]")], "the .json of 1.png is not an object"),
        ([("1.png", b"a"), ("1.json", b'{"text": 5}')], "1.png: text is 5: a caption is a text"),
    ],
)
def test_a_member_that_is_no_image_of_its_key_is_named(tmp_path: Path, members: Members, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_image_set(str(write_shard(tmp_path / "x.tar", [*captioned(), *members])), PLAIN)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": tarfile.LNKTYPE, "linkname": "000.png"}, "5.png is a hard link"),
        ({"type": tarfile.SYMTYPE, "linkname": "000.png"}, "5.png is a symbolic link"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "5.png is a sparse file"),
        ({"pax_headers": {"GNU.sparse.major": "1"}}, "5.png is a sparse file"),
        ({"type": tarfile.FIFOTYPE}, "5.png is no file"),
    ],
)
def test_links_and_devices_are_named(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        add(shard, "000.png", png(0))
        add(shard, "5.png", **fields)
    with pytest.raises(UserError, match=said):
        read_image_set(str(tmp_path / "x.tar"), PLAIN)


@pytest.mark.parametrize("location", ["https://host/train-{00..09}.tar", "pipe:cat x.tar", "s3://bucket/x.tar"])
def test_nothing_is_downloaded(location: str) -> None:
    with pytest.raises(UserError, match="nothing is downloaded"):
        read_image_set(location, PLAIN)


def test_compressed_shards_in_a_folder_are_named(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as shard:
        add(shard, "1.png", png(1))
    (tmp_path / "x.tar.gz").write_bytes(content.getvalue())
    for location in (tmp_path, tmp_path / "x.tar.gz"):
        with pytest.raises(UserError, match=r"x.tar.gz is compressed"):
            read_image_set(str(location), PLAIN)


def test_an_image_is_read_from_a_file_that_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if another thread had pushed it out of those that are kept open.
    monkeypatch.setattr("erasediff.data.sources.webdataset.OPEN_SHARDS", 0)
    images = read_image_set(str(write_shard(tmp_path / "x.tar", captioned())), PLAIN).images
    assert [image.read() for image in images] == [png(0), png(1), png(2)]


def test_a_shard_that_changes_under_a_run_is_refused(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "x.tar", captioned())
    images = read_image_set(str(shard), PLAIN).images
    os.truncate(shard, 100)
    with pytest.raises(UserError, match="changed while it was being read"):
        images[1].read()
