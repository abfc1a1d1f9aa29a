"""WikiText (Merity et al. 2016): its tokenised articles as plain text, and perplexity per word of the original.

WikiText is distributed as words between spaces. Models of plain text read it with the spaces put back where writers put
them; perplexity is still taken per word of the original file, line ends included, so that numbers of different
tokenisers can be compared (spec section 6.3): exp(total nats / words).
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from retro_jax.evaluation.bits_per_byte import DocumentScores

_TITLE = re.compile(r" = ([^=].*?) = \n?$")
_HEADING = re.compile(r"^(?:= )+(.*?)(?: =)+$")
# In order. What stands between words in the original, and what writers put there.
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),  # hyphens, and separators inside numbers
        (r" ([,.;:!?%)\]}])", r"\1"),
        (r"([(\[{]) ", r"\1"),
        (r"([$£€#]) (?=\d)", r"\1"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r" '(s|d|m|t|ll|re|ve)\b", r"'\1"),
        (r"(?<= )' ([^']*?) '(?=[ ,.;:!?]|$)", r"'\1'"),
        (r"(?<=s) ' (?=\w)", "' "),
        (r" (n't)\b", r"\1"),
        (r"(?<=\d) / (?=\d)", "/"),
        (r" °", "°"),
        (r" {2,}", " "),
    )
)


@dataclasses.dataclass(frozen=True)
class Article:
    """One article.

    Attributes:
      title: of it.
      text: as writers set it.
      words: words of the original, each line end counting as one.
    """

    title: str
    text: str
    words: int


def articles(lines: Iterator[str]) -> Iterator[Article]:
    """Cuts a file of WikiText into its articles; every word and line end of the file belongs to one.

    Args:
      lines: of wiki.valid.raw, wiki.test.tokens and the like, with their line ends.
    """
    own: list[str] = []
    title = ""
    before = ""
    for line in lines:
        # Headings below the title have several equals signs.
        found = _TITLE.match(line)
        if found and not before.strip():
            if any(entry.strip() for entry in own):
                yield _article(title, own)
                own = []
            title = found[1]
        own.append(line)
        before = line
    if own:
        yield _article(title, own)


def detokenize(line: str) -> str:
    """A line of WikiText as writers set it: no spaces before punctuation, whole numbers, no marks of headings."""
    text = line.strip()
    heading = _HEADING.match(text)
    if heading:
        text = heading[1]
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def word_perplexity(scores: DocumentScores, words: int) -> float:
    """exp(nats of all documents / words of the original)."""
    return math.exp(scores.total().nats / words)


def _article(title: str, lines: list[str]) -> Article:
    paragraphs = [text for text in map(detokenize, lines) if text]
    return Article(detokenize(title), "\n\n".join(paragraphs), sum(len(line.split()) + 1 for line in lines))
