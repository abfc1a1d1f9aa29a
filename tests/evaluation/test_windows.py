"""Windows over a document score every token once, with enough context."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.evaluation.windows import check_window, document_windows

M = 4


@settings(deadline=None, max_examples=300)
@given(tokens=st.integers(0, 200), stride=st.integers(1, 6), extra=st.integers(0, 6))
def test_every_label_is_scored_once_with_the_promised_context(tokens, stride, extra):
    window, stride = (stride + extra) * M, stride * M
    windows = list(document_windows(3, tokens, window=window, stride=stride))
    scored = [position for w in windows for position in range(w.scored_from, w.scored_to)]
    assert scored == list(range(1, tokens))
    for i, w in enumerate(windows):
        assert w.document == 3
        assert w.start == i * stride and w.start % M == 0
        assert 0 < w.length <= window
        assert w.start < w.scored_from and w.scored_to - 1 <= w.start + w.length < tokens
        if i:
            assert w.scored_from - w.start > window - stride


@pytest.mark.parametrize("tokens", [64, 1024, 2048, 2049, 2050, 3073])
def test_paper_windows_at_the_edges(tokens):
    windows = list(document_windows(0, tokens, window=2048, stride=1024))
    assert sum(w.scored_to - w.scored_from for w in windows) == tokens - 1
    assert len(windows) == max(1, -(-(tokens - 2049) // 1024) + 1)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [(8, 0, "must be positive"), (8, 12, "at most the window"), (10, 4, "multiples of the chunk length 4")],
)
def test_windows_off_the_chunk_grid_are_refused(window, stride, message):
    with pytest.raises(UserError, match=message):
        check_window(window, stride, M)
