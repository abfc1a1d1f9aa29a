"""WikiText is read back as writers set it, and its words are counted as published perplexities count them."""

import pytest

from retro_jax.evaluation.bits_per_byte import DocumentScores
from retro_jax.evaluation.wikitext import articles, detokenize, word_perplexity

LINES = [
    " \n",
    " = First article = \n",
    " \n",
    " It has 1 @,@ 234 words ( or so ) , says Meier 's book . \n",
    " = = A section = = \n",
    " \n",
    " Sold for $ 3 @.@ 5 million at 50 % ; a well @-@ known price . \n",
    " \n",
    " = Second article = \n",
    " \n",
    " Short . \n",
]


def test_articles_are_cut_at_their_titles_and_no_word_or_line_end_is_lost():
    first, second = articles(iter(LINES))
    assert first.title == "First article" and second.title == "Second article"
    assert first.text == (
        "First article\n\nIt has 1,234 words (or so), says Meier's book.\n\nA section\n\n"
        "Sold for $3.5 million at 50%; a well-known price."
    )
    assert second.text == "Second article\n\nShort."
    assert first.words + second.words == sum(len(line.split()) + 1 for line in LINES)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (' He said " no " , twice . \n', 'He said "no", twice.'),
        (" They don 't ; she 'll go . \n", "They don't; she'll go."),
        (" The Joneses ' house \n", "The Joneses' house"),
        (" called ' odd ' . \n", "called 'odd'."),
        (" [ sic ] / and / or \n", "[sic] / and / or"),
        (" a = b \n", "a = b"),
        (" \n", ""),
    ],
)
def test_spaces_are_where_writers_put_them(line, text):
    assert detokenize(line) == text


def test_perplexity_is_per_word_of_the_original():
    import numpy as np

    scores = DocumentScores(np.array([6.0, 2.0]), np.array([5, 5]), np.array([20, 20]), np.array([0, 1]))
    assert word_perplexity(scores, 4) == pytest.approx(np.exp(2.0))
