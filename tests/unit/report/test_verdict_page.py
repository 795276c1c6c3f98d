"""Report of a run: verdict, figures, pictures, judges; one self-contained page."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from erasediff.report import FigureRow, JudgeRow, PictureGroup, PictureRow, VerdictContents, render_verdict
from erasediff.report.verdict_contents import Outcome, limit_text, value_text
from erasediff.verdict.statistics import Estimate, share

HOSTILE = '<script>alert(1)</script> & "coat" \''
RECORDS = [{"step": step, "retain_loss": 1 / step, "forget_loss": 0.5, "multiplier": None} for step in range(1, 30)]


def pictures(level: int, count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


def contents(**changes: object) -> VerdictContents:
    given = VerdictContents(
        title="coat",
        verdict="A coat is seen in 2.0% of the images that were asked for one, at most 3% is allowed.",
        outcome="passed",
        figures=[
            FigureRow(
                title="Images that show a coat",
                note="asked for a coat",
                before=share(97, 100),
                after=share(2, 100),
                limit=0.03,
                is_met=True,
            ),
            FigureRow(
                title="Retained, recognised", after=share(90, 100), relation="at least", limit=0.95, is_met=False
            ),
            FigureRow(title="Drift", kind="number", after=Estimate(-1.2345, -2.0, 1.5, 1234), limit=1.5),
        ],
        pictures=[
            PictureGroup("Forgotten", [PictureRow(HOSTILE, pictures(10), pictures(200))]),
            PictureGroup("Retained", [PictureRow("a photo of a bag", pictures(90, 12, 512), pictures(91, 12, 512))]),
        ],
        judges=[JudgeRow("original", {"sha256": "0123abcd", "labels": ["a", "<b>"]}, share(97, 100))],
        records=RECORDS,
        command=f"erasediff unlearn --forget-class '{HOSTILE}'",
        settings="seed: 0",
        versions={"torch": "9.9.9"},
        notes=["One seed was asked."],
    )
    return replace(given, **changes)


class Page(HTMLParser):
    """Collects text, tags, pictures and what the page would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts, self.tags, self.sources = [], [], []
        self.feed(html)
        self.text, self.words = "".join(self.parts), " ".join(" ".join(self.parts).split())

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attributes if name in ("src", "srcset", "href")]

    def pictures(self) -> list[Image.Image]:
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in self.sources]


def test_the_page_loads_and_runs_nothing() -> None:
    html = render_verdict(contents())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert "script" not in page.tags
    assert "b" in page.tags
    assert all(source.startswith(("data:image/png;base64,", "data:image/webp;base64,")) for source in page.sources)
    assert not re.search(r"url\(|@import|https?://|<link|<iframe", html)


def test_prompts_are_shown_as_they_are() -> None:
    text = Page(render_verdict(contents())).text
    assert HOSTILE in text
    assert f"--forget-class '{HOSTILE}'" in text
    assert '"<b>"' in text


def test_figures_have_interval_limit_and_answer() -> None:
    words = Page(render_verdict(contents())).words
    assert "Images that show a coat asked for a coat 97.0% 2.0% ✓ met 0.6% to 7.0% at most 3% 100" in words
    assert "Retained, recognised – 90.0% ✗ not met 82.6% to 94.5% at least 95% 100" in words
    assert "Drift – −1.23 ? cannot tell −2 to 1.5 at most 1.5 1,234" in words


@pytest.mark.parametrize(
    ("outcome", "said"), [("passed", "✓ Passed."), ("failed", "✗ Failed."), ("undecided", "? Undecided.")]
)
def test_the_verdict_is_at_the_top_in_words_and_an_icon(outcome: Outcome, said: str) -> None:
    page = Page(render_verdict(contents(outcome=outcome)))
    assert f"Forgetting coat {said} A coat is seen in 2.0%" in page.words
    assert page.words.index(said) < page.words.index("Figures")


def test_pictures_stand_one_above_the_other_with_small_ones_exact() -> None:
    before, after, retained, _ = Page(render_verdict(contents(records=[]))).pictures()
    assert before.size == after.size == (3 * 17 - 1, 16)
    assert before.getpixel((0, 0)) == (10, 10, 10, 255)
    assert after.getpixel((0, 0)) == (200, 200, 200, 255)
    assert before.getpixel((16, 0))[3] == 0
    assert retained.size == (8 * 161 - 1, 160)


def test_rows_of_different_length_are_aligned() -> None:
    group = PictureGroup(
        "Forgotten", [PictureRow("a", pictures(1, 2), pictures(2, 5)), PictureRow("b", *2 * [pictures(0, 0)])]
    )
    assert {picture.size for picture in Page(render_verdict(contents(pictures=[group], records=[]))).pictures()} == {
        (5 * 17 - 1, 16)
    }


def test_what_there_is_not_is_left_out() -> None:
    page = Page(render_verdict(contents(pictures=[PictureGroup("Forgotten", [])], judges=[], records=[], notes=[])))
    assert not page.sources
    for heading in ("Forgotten", "Judges", "Training curves"):
        assert heading not in page.words
    curved = Page(render_verdict(contents(pictures=[])))
    # Losses, light and dark; the multiplier was not recorded.
    assert len(curved.sources) == 4


def test_judges_show_their_control_and_description() -> None:
    words = Page(render_verdict(contents())).words
    assert "Control: 97.0% of 100 images of the original model recognised (91.5% to 99.0%)." in words
    assert '"sha256": "0123abcd"' in words


def test_numbers_that_are_none_are_dashes() -> None:
    assert [value_text(value, "number") for value in (None, float("nan"), float("inf"), -float("inf"))] == [
        "–",
        "–",
        "∞",
        "−∞",
    ]
    assert limit_text(FigureRow(title="", after=share(0, 0))) == "–"
