"""The longest common token substrings are those that comparing every substring finds."""

import types

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from retro_jax.evaluation.leakage import leakage_curve, leaked_shares, overlap_classes, run_classes
from retro_jax.evaluation.losses import TokenLosses
from retro_jax.evaluation.overlap import common_runs

# Few tokens, so that runs are common, and places without text among them.
TOKENS = st.sampled_from([-1, 0, 4, 5, 6])


def brute_force(chunk, neighbours):
    """Longest run ending at each place, by looking every substring up in every neighbour."""
    texts = ["".join(chr(97 + token) if token >= 0 else "#" for token in one) for one in neighbours]
    own = "".join(chr(97 + token) if token >= 0 else "?" for token in chunk)
    return [
        max((end - start for start in range(end) for text in texts if own[start:end] in text), default=0)
        for end in range(1, len(own) + 1)
    ]


@settings(deadline=None, max_examples=150)
@given(
    chunks=arrays.arrays(np.int32, (3, 7), elements=TOKENS),
    neighbours=arrays.arrays(np.int32, (3, 2, 9), elements=TOKENS),
)
def test_runs_are_those_of_every_substring(chunks, neighbours):
    found = common_runs(chunks, neighbours)
    assert found.tolist() == [brute_force(*pair) for pair in zip(chunks, neighbours, strict=True)]


def test_a_copied_chunk_leaks_wholly_and_one_without_neighbours_not_at_all():
    chunk = np.arange(10, 18, dtype=np.int32)[None]
    copied = np.concatenate([[3], chunk[0], [9, 9, 9]]).astype(np.int32)
    assert common_runs(chunk, copied[None, None]).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert not common_runs(chunk, np.zeros((1, 0, 16), np.int32)).any()
    assert not common_runs(chunk, np.full((1, 2, 16), -1, np.int32)).any()


class FewChunks:
    """Four chunks of four tokens, the last one with two tokens of text."""

    num_chunks, chunk_length = 4, 4
    tokenizer = types.SimpleNamespace(is_text=lambda tokens: tokens > 2)
    _tokens = np.array([[1, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20], [21, 22, 2, 0]], np.int32)

    def tokens(self, ids):
        return self._tokens[ids]

    def byte_counts(self, ids):
        return np.array([6, 8, 10, 4])[ids]


def test_the_curve_keeps_chunks_up_to_alpha_and_ends_at_the_ordinary_value():
    corpus = FewChunks()
    runs = np.array([[0, 0, 0, 0], [1, 2, 0, 0], [1, 2, 3, 4], [1, 1, 0, 0]], np.int32)
    shares = leaked_shares(corpus, runs)
    assert shares.tolist() == [0, 0.5, 1, 0.5]
    nats = np.array([[0, 1, 1, 1], [2, 2, 2, 2], [1, 0, 0, 1], [3, 3, 0, 0]], np.float32)
    points = leakage_curve(TokenLosses(corpus, nats), shares, (0.0, 0.5, 1.0))
    assert [point.chunks for point in points] == [1, 3, 4] and [point.bytes for point in points] == [6, 18, 28]
    assert [point.bits_per_byte * point.bytes * np.log(2) for point in points] == [3.0, 17.0, 19.0]


def test_classes_have_their_upper_ends_within():
    names, classes = overlap_classes(np.array([0, 0.0625, 0.07, 0.125, 0.5, 0.51, 1.0]))
    assert [names[number] for number in classes] == [
        "0-6.25 %",
        "0-6.25 %",
        "6.25-12.5 %",
        "6.25-12.5 %",
        "25-50 %",
        "50-100 %",
        "50-100 %",
    ]
    names, classes = run_classes(np.array([0, 1, 4, 5, 64]))
    assert [names[number] for number in classes] == ["0", "1", "4", "5+", "5+"]
