"""Every row of metadata describes an image or is refused by name, wherever the file lies and however it was written."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from erasediff.data.forget_split import forget_classes, forget_phrases
from erasediff.data.image_folder import CaptionedImage, read_captioned_images
from erasediff.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """0.png, train/1.png, train/cat/2.png."""
    for number, name in enumerate(("0.png", "train/1.png", "train/cat/2.png")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(path)
    return tmp_path / "data"


def write(table: Path, *rows: dict[str, object]) -> None:
    table.write_text("\n".join(json.dumps(row) for row in rows))


def captions(folder: Path, **options: str) -> dict[str, str]:
    return {image.path.name: image.caption for image in read_captioned_images(folder, **{"template": "none"} | options)}


class TestPlaces:
    def test_names_are_relative_to_their_own_metadata(self, folder: Path) -> None:
        write(folder / "metadata.jsonl", {"file_name": "0.png", "text": "zero"})
        write(folder / "train/metadata.jsonl", {"file_name": "1.png", "text": "one"})
        (folder / "train/cat/metadata.csv").write_text("file_name,caption\n2.png,two\n", encoding="utf-8-sig")
        assert captions(folder) == {"0.png": "zero", "1.png": "one", "2.png": "two"}

    def test_a_folder_above_and_the_folder_itself_may_not_both_describe_an_image(self, folder: Path) -> None:
        write(folder / "metadata.jsonl", {"file_name": "train/1.png", "text": "one"})
        write(folder / "train/metadata.jsonl", {"file_name": "1.png", "text": "another"})
        with pytest.raises(UserError, match=r"train/metadata\.jsonl, line 1: 1\.png has a row already, .*line 1"):
            captions(folder)

    def test_metadata_of_another_format_is_named(self, folder: Path) -> None:
        (folder / "train/metadata.parquet").touch()
        with pytest.raises(UserError, match=r"train/metadata\.parquet is metadata in a format that is not read"):
            captions(folder)


class TestNames:
    def test_absolute_paths(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(folder / "metadata.jsonl", {"file_name": str((folder / "0.png").resolve()), "text": "zero"})
        (folder / "0.txt").write_text("stale")
        monkeypatch.chdir(folder.parent)
        assert captions(Path("data"))["0.png"] == "zero"

    def test_a_folder_behind_a_link(self, folder: Path) -> None:
        (folder.parent / "link").symlink_to(folder)
        write(folder / "metadata.jsonl", {"file_name": str(folder / "0.png"), "text": "zero"})
        assert captions(folder.parent / "link")["0.png"] == "zero"

    @pytest.mark.parametrize("name", ["train\\cat\\2.png", "./train/cat/2.png", "train/../train/cat/2.png", " 0.png "])
    def test_other_spellings(self, folder: Path, name: str) -> None:
        write(folder / "metadata.jsonl", {"file_name": name, "text": "found"})
        assert list(captions(folder).values()).count("found") == 1

    @pytest.mark.parametrize(("disk", "row"), [("NFC", "NFD"), ("NFD", "NFC")])
    def test_unicode_forms(self, folder: Path, disk: str, row: str) -> None:
        name = "é.png"
        Image.new("RGB", (2, 2)).save(folder / unicodedata.normalize(disk, name))
        write(folder / "metadata.jsonl", {"file_name": unicodedata.normalize(row, name), "text": "found"})
        assert "found" in captions(folder).values()

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("../other.png", r"other\.png is outside of"),
            (".hidden/0.png", r"\.hidden/0\.png is hidden"),
            ("notes.txt", r"notes\.txt is no image that can be read"),
            ("O.PNG", r"there is no image .*O\.PNG"),
            ("1.PNG", r"there is no image .*1\.PNG \(did you mean .*train/1\.png\?\); remove the row or add the file"),
            ("nul\0.png", r"there is no image"),
            (7, r"file_name is 7: write it as a text"),
            (None, r"there is no file_name"),
        ],
    )
    def test_a_row_of_no_image_is_named(self, folder: Path, name: object, said: str) -> None:
        (folder / ".hidden").mkdir()
        for other in (folder.parent / "other.png", folder / ".hidden/0.png"):
            Image.new("RGB", (2, 2)).save(other)
        (folder / "notes.txt").touch()
        write(folder / "metadata.jsonl", {"file_name": "0.png", "text": "zero"}, {"file_name": name, "text": "x"})
        with pytest.raises(UserError, match=rf"metadata\.jsonl, line 2: .*{said}"):
            captions(folder)


class TestCaptions:
    def test_null_is_a_missing_caption(self, folder: Path) -> None:
        write(folder / "metadata.jsonl", {"file_name": "0.png", "text": None, "artist": None, "year": 1843})
        (folder / "0.txt").write_text("from the file")
        image = read_captioned_images(folder, template="x")[0]
        assert (image.caption, dict(image.attributes)) == ("from the file", {"year": "1843"})
        (folder / "0.txt").unlink()
        with pytest.raises(UserError, match=r"0\.png and 2 more have no caption"):
            read_captioned_images(folder)

    def test_of_a_list_the_first_is_trained_and_all_are_searched(self, folder: Path) -> None:
        write(
            folder / "metadata.jsonl",
            {"file_name": "0.png", "text": ["a shoe", None, "a red sneaker"]},
            {"file_name": "train/1.png", "text": []},
        )
        images = read_captioned_images(folder, template="a boot")
        assert [image.caption for image in images] == ["a shoe", "a boot", "a boot"]
        assert [image.id for image in forget_phrases(images, ["sneaker"]).forget] == [0]

    @pytest.mark.parametrize("caption", [5, True, {"en": "a shoe"}, ["a shoe", 5]])
    def test_other_values_are_named(self, folder: Path, caption: object) -> None:
        write(folder / "metadata.jsonl", {"file_name": "0.png", "text": caption})
        with pytest.raises(UserError, match=r"line 1: text is .*: a caption is a text or a list of texts"):
            captions(folder)

    def test_each_row_has_a_caption_in_a_column_of_its_own(self, folder: Path) -> None:
        write(
            folder / "metadata.jsonl",
            {"file_name": "0.png", "text": "zero"},
            {"file_name": "train/1.png", "text": None, "caption": "one"},
        )
        assert list(captions(folder).values()) == ["zero", "one", "none"]

    def test_separators_within_a_caption(self, folder: Path) -> None:
        row = json.dumps({"file_name": "0.png", "text": "a\u2028b"}, ensure_ascii=False)
        (folder / "metadata.jsonl").write_bytes(f"{row}\r\n".encode())
        assert captions(folder)["0.png"] == "a\u2028b"


class TestClasses:
    def by_class(self, folder: Path, *classes: str, column: str = "class") -> list[str]:
        images: list[CaptionedImage] = read_captioned_images(folder, template="x")
        return [image.path.name for image in forget_classes(images, classes, column).forget]

    def test_a_folder_has_the_images_of_its_subfolders(self, folder: Path) -> None:
        assert self.by_class(folder, "train") == ["1.png", "2.png"]
        assert self.by_class(folder, "train/cat/") == ["2.png"]
        with pytest.raises(UserError, match="No image has the class 'cat'"):
            self.by_class(folder, "cat")

    def test_a_list_has_each_of_its_values(self, folder: Path) -> None:
        write(
            folder / "metadata.jsonl",
            {"file_name": "0.png", "tags": ["cat", "café"]},
            {"file_name": "train/1.png", "tags": "cat"},
        )
        assert self.by_class(folder, "cat", column="tags") == ["0.png", "1.png"]
        assert self.by_class(folder, unicodedata.normalize("NFD", "café"), column="tags") == ["0.png"]
