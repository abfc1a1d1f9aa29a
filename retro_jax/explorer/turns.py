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
    """The thread of the model.

    Attributes:
      thread: computes the pieces of all requests, one after the other.
      seats: one for each request that is let in.
      stopping: no more pieces are to be computed. A plain bool, since a signal handler sets it.
    """

    def __init__(self, most: int) -> None:
        """`most`: requests in progress at a time."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.seats = threading.BoundedSemaphore(most)
        self.stopping = False

    def begin(self, pieces: Iterator[T]) -> "Turn[T]":
        """Lets a request in, whose pieces of work are computed one by one, in turn with those of the others.

        Args:
          pieces: a generator; it runs on the thread alone.

        Raises:
          BusyError: as many as are let in are in progress.
        """
        if not self.seats.acquire(blocking=False):
            raise BusyError
        return Turn(self, pieces)

    def stop(self) -> None:
        """Lets every request end after the piece that is being computed."""
        self.stopping = True


class Turn(Generic[T]):
    """A request in progress: an asynchronous iterator over its pieces. It holds its seat until it is closed."""

    def __init__(self, turns: Turns, pieces: Iterator[T]) -> None:
        self._turns, self._pieces = turns, pieces
        self._closed = False

    def __aiter__(self) -> "Turn[T]":
        return self

    async def __anext__(self) -> T:
        if self._turns.stopping:
            raise StopAsyncIteration
        end = object()  # a StopIteration cannot pass through a future
        piece = await asyncio.wrap_future(self._turns.thread.submit(next, self._pieces, end))
        if piece is end:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Ends the work, behind the piece that is being computed, and gives the seat back. May be called again."""
        if not self._closed:
            self._closed = True
            self._turns.thread.submit(self._finish)

    def _finish(self) -> None:
        try:
            self._pieces.close()
        finally:
            self._turns.seats.release()
