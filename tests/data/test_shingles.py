import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data import shingles as shingles_module
from retro_jax.data.shingles import BANDS, ROWS, band_keys, jaccard, shingles
from retro_jax.data.words import pieces, words

TEXTS = st.lists(st.sampled_from(["a", "B", "ab", "Über", "c\n", "漢字", "ไทย", "\u3000"]), max_size=30).map(" ".join)


def plain_set(text, n):
    found = words(text)
    n = min(n, len(found))
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)} if found else set()


def similarity(one, other):
    common = len(np.intersect1d(one, other))
    return jaccard(common, len(one), len(other))


@settings(deadline=None)
@given(one=TEXTS, other=TEXTS, n=st.integers(1, 13), piece=st.integers(1, 40))
def test_hashed_shingles_are_as_alike_as_the_sets_of_words(one, other, n, piece):
    a, b = plain_set(one, n), plain_set(other, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles_module, "_PIECE_CHARACTERS", piece)
        hashed, hashed_other = shingles(one, n), shingles(other, n)
    assert len(hashed) == len(a) and len(hashed_other) == len(b)
    assert len(np.intersect1d(hashed, hashed_other)) == len(a & b)
    if a | b:
        assert similarity(hashed, hashed_other) == len(a & b) / len(a | b)


def test_words_are_lower_cased_and_characters_where_no_spaces_are_written():
    assert words("The  Quick\nfox: jumps!") == ["the", "quick", "fox:", "jumps!"]
    assert words("東京へ行く ok") == ["東", "京", "へ", "行", "く", "ok"]


@given(text=st.text(alphabet="aB 漢字ไ\n", max_size=80), size=st.integers(1, 20))
def test_pieces_are_the_text_and_cut_no_word(text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text and [word for part in parts for word in words(part)] == words(text)
    assert all(len(part) >= size for part in parts[:-1])


def test_text_without_spaces_is_read_in_pieces():
    assert [len(part) for part in pieces("漢字" * 1000, 300)] == [300] * 6 + [200]


def test_hashes_are_the_same_on_every_machine():
    assert shingles("one two three", 2).tolist() == [750378937481902481, 925262562320278646]
    assert int(band_keys(shingles("one two three", 2))[0]) == 24454155715427169


def planted(target, rng, size=400):
    """Two sets of shingles with about this Jaccard similarity."""
    common = round(2 * size * target / (1 + target))
    rows = rng.integers(0, 2**63, 2 * size - common).astype(np.uint64)
    return np.sort(rows[:size]), np.sort(rows[size - common :])


@pytest.mark.parametrize(("target", "least"), [(0.75, 0.97), (0.8, 0.985), (0.85, 0.99), (0.9, 0.99), (0.95, 0.99)])
def test_bands_name_pairs_at_the_threshold_as_candidates(target, least):
    rng = np.random.default_rng(round(100 * target))
    pairs = [planted(target, rng) for _ in range(300)]
    assert abs(np.mean([similarity(*pair) for pair in pairs]) - target) < 0.002
    met = np.mean([(band_keys(one) == band_keys(other)).any() for one, other in pairs])
    assert met >= least


def test_bands_name_the_candidates_that_datasketch_names():
    rng = np.random.default_rng(0)
    pairs = [planted(target, rng, 100) for target in np.linspace(0.3, 0.9, 60)]
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))

    def signature(members):
        made = MinHash(BANDS * ROWS, seed=1, hashfunc=int, scheme="affine64")
        made.update_batch(members.tolist())
        return made

    for i, (one, _) in enumerate(pairs):
        index.insert(i, signature(one))
    for i, (one, other) in enumerate(pairs):
        assert (i in index.query(signature(other))) == bool((band_keys(one) == band_keys(other)).any())
