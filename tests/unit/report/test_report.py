"""HTML report: one self-contained file with all that it was given."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from erasediff.data import load_digits
from erasediff.evaluation import Judge, conditional_metrics, evaluation_labels, unconditional_metrics
from erasediff.report import Column, Contents, render
from erasediff.report.contents import metric_rows
from erasediff.report.render import strip

TITLES = ("Base", "EraseDiff", "Fine-tuning", "Retrained")
RECORDS = [{"step": step, "retain_loss": 1 / step, "forget_loss": 0.5, "multiplier": 0.1} for step in range(1, 30)]
COMMAND = 'erasediff demo --forget 3 --config "a&b.yaml"'


@pytest.fixture(scope="module")
def columns() -> list[Column]:
    """Real digits for samples; all but the base and the fine-tuned model show an 8 where a 3 is asked for."""
    digits = load_digits()
    judge = Judge.fit(digits)
    labels = evaluation_labels(10, (3,), per_class=3, forgotten=8)
    columns = []
    for title in TITLES:
        shown = labels.clone()
        if title in ("EraseDiff", "Retrained"):
            shown[labels == 3] = 8
        images = torch.stack([digits.train.of_classes([int(c)]).sample[0] for c in shown])
        metrics = conditional_metrics(judge, images, labels, digits.train, (3,))
        columns.append(Column(title=title, summary="", metrics=metrics, images=images, rows=labels))
    return columns


def contents(columns: list[Column]) -> Contents:
    return Contents(
        columns=columns,
        class_names=load_digits().class_names,
        judge_accuracy=0.986,
        command=COMMAND,
        settings="seed: 0",
        versions={"torch": "9.9.9"},
    )


class Page(HTMLParser):
    """Collects text and what the page would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.sources = "", []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [(tag, value) for name, value in attributes if name in ("src", "srcset", "href")]


def test_the_page_loads_nothing_from_elsewhere(columns: list[Column]) -> None:
    html = render(contents([replace(column, records=RECORDS) for column in columns]))
    page = Page(html)
    assert page.sources
    assert all(value.startswith("data:image/png;base64,") for _, value in page.sources)
    assert "<script" not in html
    assert not re.search(r"url\(|@import|https?://", html)


def test_the_page_shows_numbers_command_and_versions(columns: list[Column]) -> None:
    text = Page(render(contents(columns))).text
    for shown in ("Forgetting 3", COMMAND, "seed: 0", "9.9.9", "98.6%", "goal met", *TITLES):
        assert shown in text
    assert "goal missed" not in text


def test_a_missed_goal_is_said(columns: list[Column]) -> None:
    assert "goal missed" in Page(render(contents([columns[0], columns[2]]))).text


def test_there_is_a_picture_per_model_and_class_and_a_curve_per_recorded_quantity(columns: list[Column]) -> None:
    plain = Page(render(contents(columns)))
    curved = Page(render(contents([columns[0], replace(columns[1], records=RECORDS)])))
    assert len(plain.sources) == len(TITLES) * 10
    assert len(curved.sources) == 2 * 10 + 3 * 2


def test_an_unconditional_report_counts_shares(columns: list[Column]) -> None:
    digits = load_digits()
    judge = Judge.fit(digits)
    unconditional = [
        replace(
            column,
            rows=judge.classify(column.images),
            metrics=unconditional_metrics(judge, column.images, digits.train, (3,)),
        )
        for column in columns
    ]
    text = Page(render(contents(unconditional))).text
    assert "Share of all images, by class" in text
    assert f"generated {len(columns[0].images)} images" in text
    with pytest.raises(ValueError, match="not both"):
        render(contents([columns[0], unconditional[1]]))


def test_every_row_of_the_table_has_a_value_per_model(columns: list[Column]) -> None:
    rows = {row.label: row.values for row in metric_rows(contents(columns))}
    assert all(len(values) == len(TITLES) for values in rows.values())
    assert rows["Unlearning accuracy (UA)"] == ["0.0%", "100.0%", "0.0%", "100.0%"]


def test_a_strip_holds_the_pixels_and_leaves_missing_images_clear() -> None:
    images = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
    encoded = strip(images, columns=3).removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert pixels.shape == (2, 3 * 2 + 2, 4)
    assert pixels[0, 0].tolist() == [255, 255, 255, 255]
    assert pixels[1, 4].tolist() == [0, 0, 0, 255]
    assert (pixels[:, [2, 5, 6, 7], 3] == 0).all()
