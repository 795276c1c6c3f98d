"""Folders as people have them: each image once, and nothing that looks like one left out silently."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from erasediff.data.forget_split import forget_classes, forget_phrases
from erasediff.data.hf_datasets import read_images
from erasediff.data.image_folder import read_captioned_images
from erasediff.errors import UserError


def paint(path: Path, colour: str = "red", **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), colour).save(path, **options)
    return path


def listed(folder: Path) -> list[str]:
    return [image.path.relative_to(folder).as_posix() for image in read_captioned_images(folder, template="x")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """cat/0.png, cat/1.png, dog/2.png."""
    for number, name in enumerate(("cat/0.png", "cat/1.png", "dog/2.png")):
        paint(tmp_path / "data" / name, ("red", "green", "blue")[number])
    return tmp_path / "data"


class TestLinks:
    def test_a_loop_lists_each_image_once(self, folder: Path) -> None:
        before = listed(folder)
        (folder / "loop").symlink_to(".")
        (folder / "cat/up").symlink_to("..")
        (folder / "a-loop").symlink_to(folder)
        assert listed(folder) == before == ["cat/0.png", "cat/1.png", "dog/2.png"]

    def test_a_linked_folder_is_listed_under_its_own_path(self, folder: Path) -> None:
        (folder / "all").symlink_to("cat")
        assert listed(folder) == ["cat/0.png", "cat/1.png", "dog/2.png"]

    def test_a_folder_elsewhere_is_listed_through_the_link(self, folder: Path, tmp_path: Path) -> None:
        paint(tmp_path / "elsewhere/3.png")
        (folder / "bird").symlink_to(tmp_path / "elsewhere")
        (folder / "crow").symlink_to(tmp_path / "elsewhere")
        assert listed(folder) == ["bird/3.png", "cat/0.png", "cat/1.png", "dog/2.png"]

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_two_paths_of_a_file_are_one_image(self, folder: Path, link) -> None:
        (folder / "favourites").mkdir()
        link(folder / "dog/2.png", folder / "favourites/0.png")
        assert len(listed(folder)) == 3

    def test_an_image_is_forgotten_by_any_of_its_paths(self, folder: Path) -> None:
        """The link comes first in the alphabet and says something else."""
        (folder / "ada").mkdir()
        (folder / "ada/0.png").symlink_to("../cat/0.png")
        (folder / "ada/0.txt").write_text("by Ada")
        images = read_captioned_images(folder, template="a {class}")
        assert [image.caption for image in images] == ["a cat", "a cat", "a dog"]
        for partition in (forget_classes(images, ["ada"]), forget_phrases(images, ["by Ada"])):
            assert [image.path.name for image in partition.forget] == ["0.png"]
            assert partition.forget[0].caption == "a cat"

    @pytest.mark.parametrize("target", ["nowhere.png", "gone.png"])
    def test_a_link_that_leads_nowhere_is_named(self, folder: Path, target: str) -> None:
        (folder / "gone.png").symlink_to(target)
        with pytest.raises(UserError, match=r"gone\.png is no file"):
            read_captioned_images(folder, template="x")


class TestNames:
    def test_what_systems_leave_behind_is_no_image(self, folder: Path) -> None:
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".hidden.png", "notes.txt", "README"):
            (folder / "cat" / name).write_bytes(b"\0\5\x16\7")
        for name in (".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "@eaDir/0.png"):
            paint(folder / name)
        assert listed(folder) == ["cat/0.png", "cat/1.png", "dog/2.png"]

    def test_suffixes_of_any_case_and_images_without_one(self, folder: Path) -> None:
        paint(folder / "dog/3.JPG")
        paint(folder / "dog/photo", format="PNG")
        paint(folder / "dog/4.jpg_large", format="JPEG")
        assert listed(folder)[2:] == ["dog/2.png", "dog/3.JPG", "dog/4.jpg_large", "dog/photo"]

    @pytest.mark.parametrize("name", ["IMG_1.CR2", "logo.svg", "layers.psd", "scan.eps"])
    def test_images_that_cannot_be_read_are_named(self, folder: Path, name: str) -> None:
        (folder / "dog" / name).write_bytes(b"?")
        with pytest.raises(UserError, match=rf"dog/{name} cannot be read as an image here: convert it"):
            read_captioned_images(folder, template="x")

    def test_many_are_counted(self, folder: Path) -> None:
        for number in range(5):
            (folder / f"{number}.dng").touch()
        with pytest.raises(UserError, match=r"0\.dng, .*1\.dng, .*2\.dng and 2 more cannot be read"):
            read_captioned_images(folder, template="x")

    def test_a_folder_that_cannot_be_listed_is_named(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        scandir = os.scandir

        def refuse(path: Path):
            if Path(path).name == "dog":
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(UserError, match=r"Cannot list the folder .*dog: Permission denied"):
            read_captioned_images(folder, template="x")


class TestCaptionFiles:
    @pytest.mark.parametrize("name", ["0.txt", "0.TXT", "0.png.txt", "0.caption"])
    def test_their_names(self, folder: Path, name: str) -> None:
        (folder / "cat" / name).write_bytes("\ufeffa red cat\r\n".encode())
        assert read_captioned_images(folder, template="x")[0].caption == "a red cat"

    def test_of_several_the_usual_one_is_trained_and_all_are_searched(self, folder: Path) -> None:
        for suffix in ("txt", "caption", "png.txt"):
            (folder / f"cat/0.{suffix}").write_text(f"from {suffix}")
        images = read_captioned_images(folder, template="x")
        assert images[0].caption == "from txt"
        assert [image.id for image in forget_phrases(images, ["from caption"]).forget] == [0]

    def test_their_unicode_form_may_differ_from_the_image(self, folder: Path) -> None:
        paint(folder / unicodedata.normalize("NFD", "dog/é.png"))
        (folder / unicodedata.normalize("NFC", "dog/é.txt")).write_text("a café")
        assert read_captioned_images(folder, template="x")[-1].caption == "a café"

    def test_an_empty_one_is_a_missing_caption(self, folder: Path) -> None:
        (folder / "cat/0.txt").write_bytes("\ufeff \r\n".encode())
        assert read_captioned_images(folder, template="a {class}")[0].caption == "a cat"

    def test_one_may_serve_two_images(self, folder: Path) -> None:
        paint(folder / "cat/0.jpg")
        (folder / "cat/0.txt").write_text("a red cat")
        assert [image.caption for image in read_captioned_images(folder, template="x")][:2] == ["a red cat"] * 2


class TestMissingFolders:
    def test_a_name_that_is_no_folder_is_not_looked_up_on_the_hub(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            raise AssertionError("the hub was asked")

        monkeypatch.setattr("erasediff.data.hf_datasets.read_dataset", refuse)
        monkeypatch.chdir(folder.parent)
        (folder.parent / "photos").mkdir()
        for source, said in (
            ("photoz", r"There is no folder photoz: did you mean photos\?"),
            ("PHOTOS", r"did you mean photos\?"),
            ("data/cta", r"There is no folder data/cta: did you mean data/cat\?"),
            ("data/cat/shoes", r"There is no folder data/cat/shoes: check the path"),
            ("one/two/three", r"There is no folder one/two/three: check the path"),
            ("/nowhere/photos", r"There is no folder /nowhere/photos"),
            ("data/cat/0.png", r"data/cat/0\.png is a file, not a folder"),
        ):
            with pytest.raises(UserError, match=said):
                read_images(source)
        with pytest.raises(AssertionError, match="the hub was asked"):
            read_images("owner/name")
