"""Phrases in captions, in any script: normal forms, and word boundaries where a script has them."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

FORMS = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−﹘", "-"),
        **dict.fromkeys("’‘‛ʼʹ´`′", "'"),
        **dict.fromkeys("“”„‟″", '"'),
        "_": " ",
        "\u200c": " ",  # Between a Persian word and its ending.
        **dict.fromkeys("\u00ad\u200b\u200d\u2060\ufeff\ufe0e\ufe0f"),
    }
)
"""Forms of hyphens, apostrophes and quotation marks; the underscore of tags; invisible characters."""

UNSPACED = (
    *("CJK ", "IDEOGRAPHIC ", "HIRAGANA ", "KATAKANA", "BOPOMOFO ", "HANGUL ", "YI SYLLABLE", "TANGUT", "NUSHU"),
    *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TAI ", "NEW TAI ", "JAVANESE ", "BALINESE "),
)
"""Beginnings of the Unicode names of letters that are written without spaces between words.

Korean has spaces, but particles follow a noun without one.
"""

VOWEL_SIGN_CLASSES = (0, 7, 9)
"""Canonical combining classes of the vowel signs, nuktas and viramas that are letters of an Indic word."""


def normal_form(text: str) -> str:
    """``text`` as captions and phrases are compared: NFKC, without case, one space between words."""
    if text.isascii():
        return " ".join(text.replace("_", " ").replace("`", "'").lower().split())
    # The compatibility form of some characters has accents or cases again.
    text = unicodedata.normalize("NFKC", text.translate(FORMS)).casefold()
    text = unicodedata.normalize("NFKC", text).translate(FORMS)
    return " ".join(text.split())


def contains_phrase(caption: str, phrase: str) -> bool:
    """Return true if ``phrase`` is in ``caption`` as whole words; both in ``normal_form``.

    A word ends where a letter or digit has no other beside it. Letters of scripts that are written without spaces, as
    Chinese, Japanese and Thai, need no end. A plural is another word.
    """
    start = caption.find(phrase)
    while start >= 0:
        end = start + len(phrase)
        if not _joined(caption[start - 1 : start], phrase[0]) and not _joined(phrase[-1], caption[end : end + 1]):
            return True
        start = caption.find(phrase, start + 1)
    return False


def words_of(caption: str) -> list[str]:
    """Words of a caption in ``normal_form``."""
    return re.findall(r"\w[\w'-]*", caption)


def _joined(left: str, right: str) -> bool:
    """Whether no word may end between two characters."""
    return _is_spaced_letter(left) and _is_spaced_letter(right)


@lru_cache(maxsize=4096)
def _is_spaced_letter(character: str) -> bool:
    if not character:
        return False
    if character.isascii():
        return character.isalnum()
    category = unicodedata.category(character)
    letter = character.isalnum() or (
        category in ("Mn", "Mc") and unicodedata.combining(character) in VOWEL_SIGN_CLASSES
    )
    return letter and not unicodedata.name(character, "").startswith(UNSPACED)
