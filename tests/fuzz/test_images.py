"""Image folders with their captions and metadata, images' bytes, and the other formats of data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import fuzzed, refusal
from hypothesis import strategies as st
from mutations import BYTES, CONTENTS, PATHS, WORDS, Change, apply, changes
from seeds import PICTURES, copy_of, make_images, make_tables

from erasediff.data import ReadOptions, read_image_set
from erasediff.data.preprocessing import open_picture, picture_size

OPTIONS = [
    ReadOptions(),
    ReadOptions(captions=True),
    ReadOptions(captions=True, template="a photo of a {class}"),
    ReadOptions(captions=True, caption_column="source", class_column="score"),
]
options = st.sampled_from(OPTIONS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tables(tmp_path_factory.mktemp("tables") / "tables")


def read(location: Path, chosen: ReadOptions) -> None:
    """List a data set, and decode its images as training does."""
    found = read_image_set(str(location), chosen)
    for image in found.images:
        assert image.caption or not chosen.captions
        name = str(image.path)
        content = image.read()
        height, width = picture_size(content, name)
        assert open_picture(content, name).size == (width, height)


@fuzzed(250, found=changes(), chosen=options)
def test_image_folders(found: list[Change], chosen: ReadOptions, images: Path) -> None:
    with copy_of(images) as folder:
        apply(folder, found)
        refusal(lambda: read(folder, chosen))


NAMES = st.sampled_from((*PATHS, *WORDS, "a.png", "b.PNG", ".a.png", "a.png.txt", "metadata.jsonl", "é.jpg", "a..png"))


@fuzzed(150, names=st.lists(NAMES | st.text(max_size=6), max_size=4), content=st.sampled_from(CONTENTS), chosen=options)
def test_names_in_a_folder(names: list[str], content: bytes, chosen: ReadOptions, images: Path) -> None:
    with copy_of(images) as folder:
        for name in names:
            try:
                (folder / name.replace("/", "_")).write_bytes(PICTURES["rgb.png"] if name.endswith("g") else content)
            except (OSError, ValueError):
                continue  # A name that no file can have.
        refusal(lambda: read(folder, chosen))


@fuzzed(
    250, rows=st.lists(st.text(max_size=12) | st.sampled_from((*PATHS, *WORDS, '"', "a,b", ",,", "\r")), max_size=6)
)
def test_texts_of_metadata(rows: list[str], images: Path) -> None:
    with copy_of(images) as folder:
        table = folder / "dog" / "metadata.csv"
        text = table.read_text() + "\n".join(rows)
        table.unlink()
        table.write_text(text, encoding="utf-8", errors="surrogatepass")
        refusal(lambda: read(folder, OPTIONS[1]))


@fuzzed(600, name=st.sampled_from(sorted(PICTURES)), found=changes(*BYTES))
def test_bytes_of_images(name: str, found: list[Change]) -> None:
    """An image that is read has the size that was told before, and three channels."""
    path = Path("image")
    path.write_bytes(PICTURES[name])
    apply(path, found)
    content = path.read_bytes()

    def opened() -> None:
        height, width = picture_size(content, name)
        image = open_picture(content, name)
        assert (image.size, image.mode) == ((width, height), "RGB")

    refusal(opened)


@fuzzed(
    250,
    which=st.integers(0, 4),
    found=changes(*BYTES, "folder_instead", "special_instead", "link_instead"),
    chosen=options,
)
def test_tables(which: int, found: list[Change], chosen: ReadOptions, tables: Path) -> None:
    source = sorted(tables.iterdir())[which]
    with copy_of(source) as file:
        apply(file, found)
        refusal(lambda: read(file, chosen))
