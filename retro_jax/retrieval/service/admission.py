"""A bounded queue before the search: what does not fit is told so at once, so that what is accepted stays quick."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator


class QueueFullError(Exception):
    """The queue has no room."""


class TooLateError(Exception):
    """The time was over, or the caller gone, before a slot was free."""


class Ticket:
    """One request on its way through an `Admission`; `cancel` may be called from any thread, before or after."""

    def __init__(self, queries: int) -> None:
        self.queries = queries
        self.cancelled = False
        self._granted = False
        self._wake = threading.Event()

    def cancel(self) -> None:
        """The caller does not wait any longer."""
        self.cancelled = True
        self._wake.set()


class Admission:
    """So many requests at a time; behind them a queue, first come first served, bounded in requests and queries.

    Attributes:
      running, waiting, waiting_queries: how many there are now.
    """

    def __init__(self, slots: int, *, requests: int, queries: int) -> None:
        """Sets the bounds.

        Args:
          slots: requests that run at a time.
          requests: requests that wait at most.
          queries: queries of waiting requests at most; one request may wait however many it has.
        """
        self.running = 0
        self.waiting_queries = 0
        self._slots = slots
        self._requests = requests
        self._queries = queries
        self._line: deque[Ticket] = deque()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @contextlib.contextmanager
    def slot(self, ticket: Ticket, seconds: float) -> Iterator[None]:
        """Holds a slot; waits for one at most so many seconds.

        Raises:
          QueueFullError: the queue has no room.
          TooLateError: the time is over, or the ticket was cancelled.
        """
        self._enter(ticket, seconds)
        try:
            yield
        finally:
            with self._lock:
                self._hand_on()

    def _enter(self, ticket: Ticket, seconds: float) -> None:
        with self._lock:
            if ticket.cancelled or seconds <= 0:
                raise TooLateError
            if self.running < self._slots and not self._line:
                self.running += 1
                return
            too_much = self._line and self.waiting_queries + ticket.queries > self._queries
            if len(self._line) >= self._requests or too_much:
                raise QueueFullError
            self._line.append(ticket)
            self.waiting_queries += ticket.queries
        ticket._wake.wait(seconds)
        with self._lock:
            if ticket._granted and not ticket.cancelled:
                return
            if ticket._granted:
                self._hand_on()
            else:
                self._line.remove(ticket)
                self.waiting_queries -= ticket.queries
            raise TooLateError

    def _hand_on(self) -> None:
        """Gives a slot that has become free to the first in the queue."""
        if self._line:
            ticket = self._line.popleft()
            self.waiting_queries -= ticket.queries
            ticket._granted = True
            ticket._wake.set()
        else:
            self.running -= 1
