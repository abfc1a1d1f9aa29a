"""What a chunk has in common with its neighbours, token for token."""

from collections.abc import Sequence

import numpy as np


def common_runs(tokens: Sequence[int], others: Sequence[Sequence[int]]) -> list[int]:
    """For each token the length of the longest run of tokens that ends at it and occurs in one of the others.

    The longest common prefix of the paper's figures (appendix E.1), as a number of tokens: 0 where no other has the
    token.

    Args:
      tokens: n token ids.
      others: sequences of token ids, of any lengths.
    """
    tokens = np.asarray(tokens, np.int64)
    longest = np.zeros(len(tokens), np.int64)
    for other in others:
        run = np.zeros(len(tokens) + 1, np.int64)  # run[i + 1]: tokens up to i that end at the place in `other`
        for token in other:
            run[1:] = np.where(tokens == token, run[:-1] + 1, 0)
            np.maximum(longest, run[1:], out=longest)
    return longest.tolist()
