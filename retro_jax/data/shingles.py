"""Documents as sets of 13-word shingles, and how alike two sets are: exact Jaccard and MinHash (paper section 2.1).

A shingle is n words (`words.py`) in a row, kept as a 64-bit hash that is the same on every machine; a document of fewer
than n words is one shingle.
"""

from hashlib import blake2b

import numpy as np
from datasketch import MinHash

from retro_jax.data.words import pieces, words

BANDS, ROWS = 21, 6
_SEED = 1
_PIECE_CHARACTERS = 2**20
_KNOWN_WORDS = 2**20
_SIGNED_AT_ONCE = 2**13  # datasketch needs a kilobyte for each
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _WordHashes(dict):
    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        number = self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return number


_word_hashes = _WordHashes()


def shingles(text: str, n: int) -> np.ndarray:
    """uint64 [distinct shingles], sorted: hashes of every n words in a row.

    A long text is read piece by piece: besides it, memory holds 18 bytes a word, a character in scripts without spaces.
    """
    parts, last = [], np.zeros(0, np.uint64)  # the words that the next piece goes on from
    for piece in pieces(text, _PIECE_CHARACTERS):
        found = words(piece)
        hashes = np.concatenate([last, np.fromiter(map(_word_hashes.__getitem__, found), np.uint64, len(found))])
        if len(hashes) >= n:
            parts.append(np.unique(_combined(hashes, n)))
        last = hashes[max(0, len(hashes) - n + 1) :]
    if not parts:
        return _combined(last, len(last)) if len(last) else last
    together = np.concatenate(parts)
    parts.clear()
    together.sort()
    return together[np.append(True, together[1:] != together[:-1])]


def jaccard(common: np.ndarray | int, size: np.ndarray | int, other: np.ndarray | int) -> np.ndarray | float:
    """Size of the intersection by size of the union, of sets of these sizes with so many members in common."""
    return common / (size + other - common)


def band_keys(members: np.ndarray) -> np.ndarray:
    """uint64 [BANDS]: MinHash-LSH keys of a set [members] of shingles; sets that share a key are candidates.

    Two sets of Jaccard J share one with probability 1 - (1 - J^ROWS)^BANDS: 0.998 at 0.8, 0.6 at 0.6, 0.08 at 0.4.
    """
    signature = MinHash(BANDS * ROWS, seed=_SEED, hashfunc=int, scheme="affine64", permutations=_permutations)
    for start in range(0, len(members), _SIGNED_AT_ONCE):
        signature.update_batch(members[start : start + _SIGNED_AT_ONCE].tolist())
    keys = np.arange(BANDS, dtype=np.uint64)
    for column in signature.hashvalues.reshape(BANDS, ROWS).T:
        keys = _mixed(keys * _MULTIPLIER + column)
    return keys


_permutations = MinHash(BANDS * ROWS, seed=_SEED, hashfunc=int, scheme="affine64").permutations


def _combined(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [words - n + 1]: a hash of every n words in a row, from those of the words."""
    combined = np.zeros(len(hashes) - n + 1, np.uint64)
    for i in range(n):
        combined *= _MULTIPLIER
        combined += hashes[i : len(combined) + i]
    return _mixed(combined)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads them evenly (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
