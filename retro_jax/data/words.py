"""What a word is where texts are compared: what stands between white space; in scripts without spaces a character."""

import re
from collections.abc import Iterator

_UNSPACED = re.compile(  # Thai, Lao, Burmese, Khmer, kana, Han
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WORD_END = re.compile(rf"\s|{_UNSPACED.pattern}")


def words(text: str) -> list[str]:
    """The words of a text in order, lower-cased."""
    text = text.lower()
    return (text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split()


def pieces(text: str, characters: int) -> Iterator[str]:
    """Parts of a text that no word reaches over: so many characters, and the rest of a word."""
    start = 0
    while start < len(text):
        found = _WORD_END.search(text, start + characters - 1)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end
