"""Sliding windows over whole documents, in which every token is scored exactly once (paper section 4.1)."""

import dataclasses
from collections.abc import Iterator

from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window:
    """One window of a document.

    Attributes:
      document: index of the document in its corpus.
      start: first input token, a position in the document; a multiple of the chunk length.
      length: input tokens, at most the window size.
      scored_from, scored_to: the labels scored here, as positions in the document, `scored_to` excluded. A label at
        position p is predicted by the input at p - 1, so all of them lie in (start, start + length].
    """

    document: int
    start: int
    length: int
    scored_from: int
    scored_to: int


def document_windows(document: int, tokens: int, *, window: int, stride: int) -> Iterator[Window]:
    """The windows of one document.

    The first window scores everything it predicts; each later one only the `stride` labels that are new, which have
    at least `window - stride` tokens before them.

    Args:
      document: index to put into the windows.
      tokens: tokens of the document, the start token (position 0, never scored) included.
      window, stride: in tokens, 0 < stride <= window.
    """
    start, scored = 0, 1
    while scored < tokens:
        # The input ends one before the last label, since that label is predicted from the token before it.
        length = min(window, tokens - 1 - start)
        end = start + length + 1
        yield Window(document, start, length, scored, end)
        scored = end
        start += stride


def check_window(window: int, stride: int, chunk_length: int) -> None:
    """Raises UserError unless 0 < stride <= window and both keep windows on the chunk grid of the document."""
    if not 0 < stride <= window:
        raise UserError(f"stride {stride} must be positive and at most the window {window}")
    if window % chunk_length or stride % chunk_length:
        raise UserError(f"window {window} and stride {stride} must be multiples of the chunk length {chunk_length}")
