"""What a word is where texts are compared: what stands between white space; in scripts without spaces a character."""

import re

_UNSPACED = re.compile(  # Thai, Lao, Burmese, Khmer, kana, Han
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def words(text: str) -> list[str]:
    """The words of a text in order, lower-cased."""
    text = text.lower()
    return (text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split()
