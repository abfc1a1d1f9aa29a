"""Exact match and F1 are SQuAD's, and an answer in a passage is found as words, not as letters."""

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.data.answers import contains_answer, exact_match, f1, normalised

# Words of the kinds that matter: articles, letters around them, punctuation, spaces of several kinds.
TEXT = st.lists(
    st.sampled_from(
        ["the", "The", "a", "an", "theatre", "cat", "Cat's", "12", "1,2", ".", "\u2013", " ", "\t", "élan", "İ"]
    )
).map(" ".join)


def reference_normalised(text):
    """Step by step, as the description of SQuAD's evaluation says."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    kept = [word for word in re.sub(r"\b(a|an|the)\b", " ", text).split() if word]
    return " ".join(kept)


def reference_f1(answer, reference):
    own, other = reference_normalised(answer).split(), reference_normalised(reference).split()
    if not own or not other:
        return float(own == other)
    common = sum((collections.Counter(own) & collections.Counter(other)).values())
    if not common:
        return 0.0
    precision, recall = common / len(own), common / len(other)
    return 2 * precision * recall / (precision + recall)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_match_and_f1_equal_the_definition_and_take_the_best_reference(answer, references):
    assert normalised(answer) == reference_normalised(answer) == normalised(normalised(answer))
    assert exact_match(answer, references) == any(
        reference_normalised(answer) == reference_normalised(each) for each in references
    )
    assert f1(answer, references) == pytest.approx(max(reference_f1(answer, each) for each in references))
    assert 0 <= f1(answer, references) <= 1
    assert not exact_match(answer, references) or f1(answer, references) == 1


@given(TEXT, TEXT)
def test_f1_is_symmetric_and_neither_articles_nor_case_nor_space_count(answer, reference):
    assert f1(answer, [reference]) == f1(reference, [answer])
    assert exact_match(f"  The {answer.upper().lower()} .", [f"{answer} an"])


def test_published_examples_of_the_normalisation():
    assert normalised("The  Theatre, a play!") == "theatre play"
    assert exact_match("the $12", ["nearly $12", "$12"])
    assert not exact_match("October 1973", ["October", "1973"])
    assert f1("in October 1973", ["October 1973"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("", ["the"]) == 1 and f1("cat", ["the"]) == 0


def test_in_scripts_without_spaces_characters_are_the_words():
    assert f1("東京都", ["東京"]) == pytest.approx(0.8)
    assert contains_answer("日本の首都は東京です", ["東京"])


def test_an_answer_is_found_as_whole_words():
    assert contains_answer("It cost nearly $12, in 1974.", ["$12"])
    assert not contains_answer("It cost 12000.", ["12"])
    assert contains_answer("He was the King of the hill.", ["king of hill", "nobody"])
    assert not contains_answer("anything", ["the"])
