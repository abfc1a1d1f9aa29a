"""Whether an answer is right: exact match and F1 of SQuAD (Rajpurkar et al. 2016, its evaluation script).

Both compare normalised answers: lower-case, without punctuation, without the articles a, an and the, without additional
white space; with several reference answers the best one counts. Words are those of `words.py`, so that F1 counts
characters in scripts without spaces, as is usual there; in English they are SQuAD's.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable

from retro_jax.data.words import words

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text as answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer is one of the reference answers."""
    own = normalised(answer)
    return any(own == normalised(reference) for reference in references)


def f1(answer: str, references: Iterable[str]) -> float:
    """The largest harmonic mean of precision and recall of the answer's words in a reference answer's, 0 to 1.

    Of two answers without any word it is 1, of an answer and one without it is 0.
    """
    return max(_f1(words(normalised(answer)), words(normalised(reference))) for reference in references)


def contains_answer(text: str, references: Iterable[str]) -> bool:
    """Whether a reference answer's words stand in the text, one after the other; articles and punctuation aside."""
    own = f" {' '.join(words(normalised(text)))} "
    found = (words(normalised(reference)) for reference in references)
    return any(f" {' '.join(each)} " in own for each in found if each)


def _f1(own: list[str], reference: list[str]) -> float:
    if not own or not reference:
        return float(own == reference)
    common = sum((Counter(own) & Counter(reference)).values())
    return 2 * common / (len(own) + len(reference))
