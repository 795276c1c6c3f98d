"""Phrases are found as a reader finds them: whole words where a script has spaces, in any Unicode form and case."""

import unicodedata

import pytest

from erasediff.data.forget_split import select_phrases
from erasediff.data.image_folder import CaptionedImage
from erasediff.data.phrases import contains_phrase, normal_form
from erasediff.errors import UserError


def found(phrase: str, caption: str) -> bool:
    return contains_phrase(normal_form(caption), normal_form(phrase))


@pytest.mark.parametrize(
    ("phrase", "caption"),
    [
        ("猫", "猫が座っている"),
        ("猫", "黒い猫"),
        ("猫", "猫、かわいい"),
        ("ネコ", "黒いﾈｺです"),
        ("ねこ", "かわいいねこがいる"),
        ("แมว", "แมวดำนั่งอยู่"),
        ("ໝາ", "ຂ້ອຍມີໝາດຳ"),
        ("ឆ្មា", "ខ្ញុំមានឆ្មាខ្មៅ"),
        ("ကြောင်", "ကျွန်တော့်ကြောင်လေး"),
        ("고양이", "검은 고양이가 앉아 있다"),
        ("cat", "黒いcatです"),
        ("猫2", "黒い猫2匹"),
        ("cat", "A CAT."),
        ("cat", "the cat's tail"),
        ("the  cat", "the\n cat"),
        ("Straße", "eine STRASSE"),
        ("t-shirt", "a T‑shirt"),
        ("o'brien", "O’Brien"),
        ("hatsune miku", "1girl, hatsune_miku, solo"),
        ("café", "ein Cafe\u0301!"),
        ("ﬁlm", "a film"),
        ("ＡＢＣ", "abc"),
        ("❤", "I ❤️ you"),
        ("किताब", "यह किताब है"),
        ("گربه", "گربه‌ها"),
        ("soft", "so\u00adft"),
    ],
)
def test_it_is_in_the_caption(phrase: str, caption: str) -> None:
    assert found(phrase, caption)


@pytest.mark.parametrize(
    ("phrase", "caption"),
    [
        ("cat", "cats"),
        ("cat", "a concatenation"),
        ("cat", "cat2"),
        ("猫2", "猫23匹"),
        ("кот", "который"),
        ("किताब", "किताबें"),
        ("cafe", "a cafés' guide"),
        ("red shoe", "red, shoe"),
        ("猫", "犬"),
    ],
)
def test_it_is_not_in_the_caption(phrase: str, caption: str) -> None:
    assert not found(phrase, caption)


def test_a_later_occurrence_counts() -> None:
    assert found("cat", "cats and a cat")


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_unicode_forms(form: str) -> None:
    for phrase, caption in (("Ångström", "ångström units"), ("ガラス", "ガラスの猫"), ("고양이", "고양이가")):
        assert found(unicodedata.normalize(form, phrase), caption)
        assert found(phrase, unicodedata.normalize(form, caption))


class TestSelection:
    IMAGES = (
        CaptionedImage("0.png", "a red sneaker", 0),
        CaptionedImage("1.png", "a boot", 1, other_captions=("a red boot",)),
        CaptionedImage("2.png", "a sandal", 2),
    )

    def test_it_says_which_phrases_select_an_image(self) -> None:
        selected = select_phrases(self.IMAGES, ["sneaker", "Red"])
        assert selected == {0: [("phrase", "sneaker"), ("phrase", "Red")], 1: [("phrase", "Red")]}

    def test_a_phrase_of_no_caption_is_named_with_near_words(self) -> None:
        with pytest.raises(UserError, match=r"No caption has 'sneakers' in it: .*, such as sneaker"):
            select_phrases(self.IMAGES, ["red", "sneakers"])

    @pytest.mark.parametrize("phrase", ["", " ", "\u200b"])
    def test_an_empty_phrase(self, phrase: str) -> None:
        with pytest.raises(UserError, match="is empty: choose words"):
            select_phrases(self.IMAGES, ["red", phrase])
