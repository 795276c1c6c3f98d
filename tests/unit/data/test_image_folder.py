"""Captioned folders and data sets as people have them, and one clear sentence for each way they can be wrong."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erasediff.data.forget_split import forget_classes, forget_files, forget_phrases
from erasediff.data.hf_datasets import read_images
from erasediff.data.image_folder import read_captioned_images
from erasediff.data.preprocessing import BrokenImage, open_picture, picture_size, to_pixels
from erasediff.errors import UserError


def paint(path: Path, colour: str = "red", size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """shoes/a.png, shoes/b.jpg, bags/a.png; no captions yet."""
    for name in ("shoes/a.png", "shoes/b.jpg", "bags/a.png"):
        paint(tmp_path / "data" / name)
    return tmp_path / "data"


class TestCaptions:
    def test_metadata_jsonl(self, folder: Path) -> None:
        rows = [
            {"file_name": "shoes/b.jpg", "text": "a boot", "artist": "Ada"},
            {"file_name": "shoes/a.png", "text": "a shoe", "year": 1843},
            {"file_name": "bags/a.png", "text": "a bag"},
        ]
        (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        images = read_captioned_images(folder)
        assert [(i.path.relative_to(folder).as_posix(), i.caption, i.id) for i in images] == [
            ("bags/a.png", "a bag", 0),
            ("shoes/a.png", "a shoe", 1),
            ("shoes/b.jpg", "a boot", 2),
        ]
        assert [dict(i.attributes) for i in images] == [
            {"class": "bags"},
            {"class": "shoes", "year": "1843"},
            {"class": "shoes", "artist": "Ada"},
        ]
        assert images[1].read() == (folder / "shoes/a.png").read_bytes()

    def test_metadata_csv_with_a_named_column_and_quoted_lines(self, folder: Path) -> None:
        (folder / "metadata.csv").write_text(
            'file_name,text,long\nbags/a.png,x,"a bag,\nworn"\nshoes/a.png,y,a shoe\nshoes/b.jpg,z,a boot\n',
            encoding="utf-8-sig",
        )
        captions = [image.caption for image in read_captioned_images(folder, caption_column="long")]
        assert captions == ["a bag,\nworn", "a shoe", "a boot"]

    def test_text_files_and_a_template_caption_what_metadata_does_not(self, folder: Path) -> None:
        (folder / "metadata.jsonl").write_text('{"file_name": "bags/a.png", "caption": "a bag"}')
        (folder / "shoes/a.txt").write_text("a shoe\n")
        images = read_captioned_images(folder, template="a photo of {class}")
        assert [image.caption for image in images] == ["a bag", "a shoe", "a photo of shoes"]

    def test_missing_captions_are_counted_and_the_first_is_named(self, folder: Path) -> None:
        (folder / "shoes/b.txt").write_text("a boot")
        with pytest.raises(UserError, match=r"bags/a\.png and 1 more have no caption: give it a row"):
            read_captioned_images(folder)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            (
                "metadata.jsonl",
                b'{"file_name": "bags/a.png", "text": "x"}\n{"file_name"',
                r"line 2 cannot be read: it is",
            ),
            ("metadata.jsonl", b'["bags/a.png"]', r"line 1 is not an object such as"),
            ("metadata.jsonl", b'{"text": "x"}', r"line 1: there is no file_name"),
            ("metadata.jsonl", b'{"file_name": "none.png", "text": "x"}', r"line 1: there is no image .*none\.png"),
            ("metadata.csv", b"file_name,text\nbags/a.png,x\nbags/a.png,y\n", r"line 3: bags/a\.png has a row already"),
            ("metadata.csv", b"file_name,text\nbags/a.png\n", r"line 2 has another number of columns"),
            ("metadata.csv", b"file_name,text\nbags/a.png,\xff\n", r"is not UTF-8"),
            ("metadata.csv", b'file_name,text\nbags/a.png,"x\n', r"is not CSV"),
        ],
    )
    def test_unreadable_metadata(self, folder: Path, name: str, content: bytes, message: str) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_captioned_images(folder)

    def test_two_metadata_files(self, folder: Path) -> None:
        for name in ("metadata.csv", "metadata.jsonl"):
            (folder / name).touch()
        with pytest.raises(UserError, match="remove one of them"):
            read_captioned_images(folder)

    def test_an_unknown_column_lists_near_ones(self, folder: Path) -> None:
        (folder / "metadata.jsonl").write_text('{"file_name": "bags/a.png", "caption_long": "x"}')
        with pytest.raises(UserError, match="choose from caption_long"):
            read_captioned_images(folder, caption_column="captions_long")

    def test_a_template_with_an_unknown_name(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"write \{class\} where"):
            read_captioned_images(folder, template="a photo of {kind}")

    def test_no_folder_and_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="There is no folder"):
            read_images(str(tmp_path / "none"))
        with pytest.raises(UserError, match="There are no images in"):
            read_images(str(tmp_path))


class TestRequest:
    @pytest.fixture
    def images(self, folder: Path):
        return read_captioned_images(folder, template="a photo of the {class}")

    def test_by_class(self, images) -> None:
        forget, retain = forget_classes(images, ["shoes"])
        assert [image.id for image in forget] == [1, 2]
        assert [image.id for image in retain] == [0]

    def test_by_phrase_of_whole_words(self, images) -> None:
        assert [image.id for image in forget_phrases(images, ["The Bags"]).forget] == [0]
        with pytest.raises(UserError, match="No caption has 'bag'"):
            forget_phrases(images, ["bag"])

    def test_by_a_list_of_files(self, images, folder: Path, tmp_path: Path) -> None:
        request = tmp_path / "request.txt"
        request.write_text(f"# ticket 7\n\nb.jpg\n{folder / 'bags/a.png'}\n")
        assert [image.id for image in forget_files(images, request).forget] == [0, 2]

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("a.png", "may be any of 2 images; write more of its path"),
            ("c.png", "is no image of the data"),
            ("# nothing", "is empty"),
        ],
    )
    def test_a_list_that_cannot_be_followed(self, images, tmp_path: Path, lines: str, message: str) -> None:
        (tmp_path / "request.txt").write_text(lines)
        with pytest.raises(UserError, match=message):
            forget_files(images, tmp_path / "request.txt")

    def test_an_unknown_class_lists_near_ones(self, images) -> None:
        with pytest.raises(UserError, match="No image has the class 'shoe': choose from shoes"):
            forget_classes(images, ["shoe"])
        with pytest.raises(UserError, match="have no 'artist' to forget by: choose from class"):
            forget_classes(images, ["shoes"], column="artist")
        with pytest.raises(UserError, match="name at least one class"):
            forget_classes(images, [])


class TestPictures:
    def test_exif_rotation_is_applied(self) -> None:
        pixels = np.zeros((2, 5, 3), np.uint8)
        pixels[0, 0] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # turn clockwise by a quarter to show it
        content = encoded(Image.fromarray(pixels), exif=exif)
        picture = open_picture(content, "x")
        assert picture_size(content, "x") == (5, 2) == (picture.height, picture.width)
        assert np.asarray(picture)[0, 1].tolist() == [255, 255, 255]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        image = Image.new("I;16", (3, 2), 65535) if mode == "I;16" else Image.new("RGB", (3, 2), "white").convert(mode)
        picture = open_picture(encoded(image, "TIFF"), "x")
        assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (255, 255, 255))

    def test_transparency_is_laid_on_white(self) -> None:
        clear = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
        palette = Image.new("P", (1, 1), 0)
        assert open_picture(encoded(clear), "x").getpixel((0, 0)) == (255, 255, 255)
        assert open_picture(encoded(palette, transparency=0), "x").getpixel((0, 0)) == (255, 255, 255)

    def test_pixels(self) -> None:
        pixels = to_pixels(Image.new("RGB", (5, 2), (0, 255, 51)))
        assert pixels.shape == (3, 2, 5)
        assert pixels[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])

    @pytest.mark.parametrize("content", [b"", b"not an image"])
    def test_what_is_no_image_is_named(self, content: bytes) -> None:
        for read in (open_picture, picture_size):
            with pytest.raises(BrokenImage, match=r"The image holiday\.png is (empty|broken)"):
                read(content, "holiday.png")

    def test_half_an_image_is_named(self) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        for format in ("PNG", "JPEG"):
            content = encoded(Image.fromarray(noise), format)
            with pytest.raises(BrokenImage, match=r"holiday\.png is broken"):
                open_picture(content[: len(content) // 2], "holiday.png")


class TestDatasets:
    @pytest.fixture
    def dataset(self):
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["shoe", "bag"]),
            }
        )
        columns = {
            "image": [Image.new("RGB", (4, 3), (grey, grey, grey)) for grey in (0, 100, 200)],
            "text": ["a shoe", "a bag", "a boot"],
            "label": [0, 1, 0],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    @pytest.mark.parametrize("layout", ["dataset", "splits", "parquet"])
    def test_saved_data_sets(self, dataset, layout: str, tmp_path: Path) -> None:
        import datasets

        if layout == "parquet":
            dataset.to_parquet(tmp_path / "train-0.parquet")
        else:
            (datasets.DatasetDict(train=dataset) if layout == "splits" else dataset).save_to_disk(tmp_path / "saved")
        source = tmp_path if layout == "parquet" else tmp_path / "saved"
        images = read_images(str(source))
        assert [(i.caption, i.attributes["class"], i.id) for i in images] == [
            ("a shoe", "shoe", 0),
            ("a bag", "bag", 1),
            ("a boot", "shoe", 2),
        ]
        assert open_picture(images[1].read(), "x").getpixel((0, 0)) == (100, 100, 100)
        if layout != "dataset":
            with pytest.raises(UserError, match="has no split 'test'"):
                read_images(str(source), split="test")

    def test_classes_fill_a_template_where_there_is_no_text(self, dataset, tmp_path: Path) -> None:
        dataset.remove_columns("text").save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match="saved/train/0 and 2 more have no caption: name the column"):
            read_images(str(tmp_path / "saved"))
        images = read_images(str(tmp_path / "saved"), template="a photo of a {class}")
        assert [image.caption for image in images] == ["a photo of a shoe", "a photo of a bag", "a photo of a shoe"]

    def test_images_alone_have_the_template(self, dataset, tmp_path: Path) -> None:
        dataset.select_columns("image").save_to_disk(tmp_path / "saved")
        assert [image.caption for image in read_images(str(tmp_path / "saved"), template="a photo")] == ["a photo"] * 3

    def test_no_image_column(self, dataset, tmp_path: Path) -> None:
        dataset.remove_columns("image").save_to_disk(tmp_path / "saved")
        with pytest.raises(UserError, match="has no image column"):
            read_images(str(tmp_path / "saved"))

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="someone/something is neither a folder here nor can it be had"):
            read_images("someone/something")

    def test_the_library_is_optional(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UserError, match=r"erasediff\[datasets\]"):
            read_images("someone/something")

    def test_lists_of_captions_missing_labels_and_missing_images(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.List(datasets.Value("string")),
                "label": datasets.ClassLabel(names=["shoe", "bag"]),
            }
        )
        columns = {
            "image": [Image.new("RGB", (4, 3)), None],
            "caption": [["a shoe", "a red sneaker"], None],
            "label": [-1, 1],
        }
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
        images = read_images(str(tmp_path / "saved"), template="a photo")
        assert [(i.caption, dict(i.attributes)) for i in images] == [
            ("a shoe", {}),
            ("a photo", {"label": "bag", "class": "bag"}),
        ]
        assert [i.id for i in forget_phrases(images, ["red sneaker"]).forget] == [0]
        with pytest.raises(UserError, match="saved/train/1: its row holds no image"):
            images[1].read()
