"""One model, several requests: they take turns on one thread, and no more than a few are let in."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class BusyError(Exception):
    """As many requests as are let in are in progress."""


class Turns:
    """The thread of the model."""

    def __init__(self, most: int) -> None:
        """`most`: requests in progress at a time."""
        self._seats = threading.BoundedSemaphore(most)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    def begin(self, pieces: Iterator[T]) -> "Turn[T]":
        """Lets a request in, whose pieces of work are computed one by one, in turn with those of the others.

        Args:
          pieces: a generator; it runs on the thread alone.

        Raises:
          BusyError: as many as are let in are in progress.
        """
        if not self._seats.acquire(blocking=False):
            raise BusyError
        return Turn(self._thread, pieces, self._seats.release)


class Turn(Generic[T]):
    """A request in progress: an asynchronous iterator over its pieces. It holds its seat until it is closed."""

    def __init__(self, thread: ThreadPoolExecutor, pieces: Iterator[T], release) -> None:
        self._thread, self._pieces, self._release = thread, pieces, release
        self._closed = False

    def __aiter__(self) -> "Turn[T]":
        return self

    async def __anext__(self) -> T:
        end = object()  # a StopIteration cannot pass through a future
        piece = await asyncio.wrap_future(self._thread.submit(next, self._pieces, end))
        if piece is end:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Ends the work, behind the piece that is being computed, and gives the seat back. May be called again."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._finish)

    def _finish(self) -> None:
        try:
            self._pieces.close()
        finally:
            self._release()
