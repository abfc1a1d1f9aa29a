"""Rows of different lengths are placed so that their chunks end together."""

from hypothesis import given
from hypothesis import strategies as st

from retro_jax.inference.placement import count_rows, count_slots, place


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=5), chunk=st.integers(1, 9), chunks=st.integers(2, 9))
def test_rows_keep_the_grid_and_fit(lengths, chunk, chunks):
    slots = chunk * chunks
    where = place(lengths, chunk_length=chunk, slots=slots)
    last = {(end - 1) // chunk for end in where.ends}
    assert len(last) == 1  # the last known tokens lie in one chunk
    assert where.slot == min(where.ends) - 1
    for length, start, end, dropped in zip(lengths, where.starts, where.ends, where.dropped, strict=True):
        assert start >= 0 and start % chunk == 0 and dropped % chunk == 0
        assert end - start == length - dropped
        assert end - start >= 1 and end <= slots
        assert (dropped > 0) == (length > slots)
        # Alone the row forgets just as much.
        assert place([length], chunk_length=chunk, slots=slots).dropped == (dropped,)


def test_a_row_that_is_full_forgets_a_quarter_of_the_chunks():
    assert place([65], chunk_length=4, slots=64).dropped == (16,)
    assert place([33], chunk_length=8, slots=16).dropped == (24,)


def test_sizes_come_in_few_kinds():
    sizes = {n: count_slots(n, chunk_length=64, most=2048) for n in (1, 512, 513, 769, 1025, 1537, 5000)}
    assert list(sizes.values()) == [512, 512, 768, 1024, 1536, 2048, 2048]
    assert count_slots(100, chunk_length=64, most=192) == 192
    assert [count_rows(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
