"""Where rows of different lengths stand in the slots of a decode state, so that their chunks end together."""

from collections.abc import Sequence
from typing import NamedTuple

from retro_jax.errors import UserError

# Fewer slots than so many chunks are not worth a compiled program of their own.
_FEWEST_CHUNKS = 8


def check_context(max_context: int, chunk_length: int) -> None:
    """Raises UserError when a context of so many tokens is not of several whole chunks."""
    if max_context % chunk_length or max_context <= chunk_length:
        raise UserError(
            f"max_context {max_context} must be a multiple of the chunk length {chunk_length}, and above it"
        )


class Placement(NamedTuple):
    """Slots of a batch of rows.

    Attributes:
      starts: slot of each row's first token; a multiple of M.
      ends: slot after its last known token.
      dropped: tokens at its beginning that are forgotten; a multiple of M.
      slot: the first slot from which all rows go on together: the last known token of the row that ends first.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]
    dropped: tuple[int, ...]
    slot: int


def place(lengths: Sequence[int], *, chunk_length: int, slots: int) -> Placement:
    """Places rows so that all their last known tokens lie in one chunk of slots.

    A row that does not fit forgets whole chunks, a quarter of the slots at once, so that long texts are not computed
    anew at every chunk. What a row forgets does not depend on the other rows.

    Args:
      lengths: known tokens of each row, at least 1.
      chunk_length: M.
      slots: S, a multiple of M.
    """
    quarter = max(1, slots // chunk_length // 4)
    dropped = []
    for length in lengths:
        surplus = -(-(length - slots) // chunk_length)
        dropped.append(chunk_length * (surplus + quarter - 1) if surplus > 0 else 0)
    kept = [length - less for length, less in zip(lengths, dropped, strict=True)]
    before = [(length - 1) // chunk_length for length in kept]  # chunks before the one of the last token
    starts = [chunk_length * (max(before) - chunks) for chunks in before]
    ends = [start + length for start, length in zip(starts, kept, strict=True)]
    return Placement(tuple(starts), tuple(ends), tuple(dropped), min(ends) - 1)


def count_slots(tokens: int, *, chunk_length: int, most: int) -> int:
    """Slots for so many tokens: one of few sizes, at most `most` (a multiple of M).

    The sizes are powers of two and one and a half times these, of chunks: every slot costs time, used or not.
    """
    slots = _FEWEST_CHUNKS * chunk_length
    while slots < tokens:
        slots *= 2
    if slots > _FEWEST_CHUNKS * chunk_length and slots // 4 * 3 >= tokens:
        slots = slots // 4 * 3
    return min(slots, most)


def count_rows(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()
