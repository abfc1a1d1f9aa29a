"""Asking servers that may be slow, full or dead: replicas of one thing are asked in turn, hedged and retried.

A call goes to the replica that looks quickest. When it takes longer than nearly all calls before, a second replica is
asked too and the first answer counts; when it fails, another replica is asked at once, then all of them again after
growing pauses, within the deadline and, where one is set, a number of attempts. All calls of this service only read, so
asking twice is harmless. gRPC's own retries cannot hedge, and do not choose.
"""

import dataclasses
import math
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import grpc

from retro_jax.errors import UserError
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.wire import REQUEST_ID, REQUEST_ID_HEADER, SERVICE, RefusedError

_ADDRESS = re.compile(r"([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):[1-9][0-9]{0,4}")
METHODS = ("Describe", "Search", "Fetch")
# What the same server may well answer later, and another one now.
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,  # by a server that goes away
    grpc.StatusCode.DEADLINE_EXCEEDED,  # the server's own, before ours
)
# What only another server may answer.
_OF_THIS_SERVER = (
    grpc.StatusCode.FAILED_PRECONDITION,  # it does not hold the version
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_TOO_LARGE = "message larger than max"
_FORGET_SECONDS = 5.0  # a slow replica is tried again when its slowness is so old
_DOWN_SECONDS = 1.0
_LOOK_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long and how often to ask.

    Attributes:
      attempts: calls at most, hedges not counted; None: as many as fit before the deadline.
      first_pause, longest_pause: seconds before all replicas are tried again; doubled each time, with jitter.
      hedge_after: seconds before a second replica is asked, while too little is known of the calls before; afterwards
        their 95th percentile. None: never.
      hedge_share: hedges for each call, in the long run.
    """

    attempts: int | None = 4
    first_pause: float = 0.02
    longest_pause: float = 1.0
    hedge_after: float | None = 0.1
    hedge_share: float = 0.05


@dataclasses.dataclass(frozen=True)
class _Ended:
    """A call that has come to its end, to be asked like a future."""

    answer: bytes
    status: grpc.StatusCode
    reason: str | None

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str | None:
        return self.reason

    def result(self) -> bytes:
        return self.answer


def check_addresses(addresses: Sequence[str], what: str) -> None:
    """Refuses what is no list of servers.

    Args:
      addresses: "host:port" each, an IPv6 host in brackets.
      what: they are of, for the message.

    Raises:
      UserError: another form, none, or the same twice.
    """
    wrong = [address for address in addresses or [""] if not _ADDRESS.fullmatch(address)]
    if wrong:
        raise UserError(f"{what} is HOST:PORT, several with commas, not {wrong[0]!r}")
    if twice := [address for address in addresses if addresses.count(address) > 1]:
        raise UserError(f"{what}: {twice[0]} is given twice; a server is no replica of itself")


class Backend:
    """One server: its channel, what is known of its speed, and whether it is worth asking."""

    def __init__(self, address: str, security: ClientSecurity, message_bytes: int) -> None:
        """Connects when it is first asked."""
        options = [
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", message_bytes),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
        ]
        self.address = address
        self.outstanding = 0
        self._channel = security.channel(address, options)
        self._metadata = security.metadata()
        self._calls = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in METHODS}
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._measured = 0.0
        self._down_until = 0.0

    @property
    def up(self) -> bool:
        return time.monotonic() >= self._down_until

    def mark(self, up: bool, seconds: float = _DOWN_SECONDS) -> None:
        """Remembers whether it answers; one that does not is asked only when nobody else is there, for so long."""
        self._down_until = 0.0 if up else time.monotonic() + seconds

    @property
    def load(self) -> float:
        """Seconds that another call would take, roughly: how quick it was of late, times what it has to do."""
        age = time.monotonic() - self._measured
        return (self.outstanding + 1) * max(self._seconds * math.exp(-age / _FORGET_SECONDS), 1e-4)

    def start(self, method: str, request: bytes, seconds: float) -> grpc.Future:
        """Starts a call; its result is the answer's bytes."""
        started = self._begin()
        call = self._calls[method].future(request, timeout=seconds, metadata=self._with_id())
        call.add_done_callback(lambda _: self._end(method, started))
        return call

    def finish(self, method: str, request: bytes, seconds: float) -> "_Ended":
        """Makes a call and waits for it: in half the time that a call of `start` takes."""
        started = self._begin()
        try:
            answer, _ = self._calls[method].with_call(request, timeout=seconds, metadata=self._with_id())
            return _Ended(answer, grpc.StatusCode.OK, "")
        except grpc.RpcError as error:
            return _Ended(b"", error.code(), error.details())
        finally:
            self._end(method, started)

    def _with_id(self) -> tuple[tuple[str, str], ...]:
        request_id = REQUEST_ID.get()
        return (*self._metadata, (REQUEST_ID_HEADER, request_id)) if request_id else self._metadata

    def _begin(self) -> float:
        with self._lock:
            self.outstanding += 1
        return time.monotonic()

    def _end(self, method: str, started: float) -> None:
        now = time.monotonic()
        with self._lock:
            self.outstanding -= 1
            if method != "Search":
                return
            # A call that was given up has taken at least so long.
            share = 1.0 if now - started > self._seconds else 0.2
            self._seconds += share * (now - started - self._seconds)
            self._measured = now

    def close(self) -> None:
        self._channel.close()


class Replicas:
    """Servers of which each can give the answer; used by many threads.

    Attributes:
      name: of what they are replicas of, for messages.
      backends: the servers.
    """

    def __init__(self, name: str, backends: Sequence[Backend], patience: Patience, metrics: Metrics | None) -> None:
        self.name = name
        self.backends = tuple(backends)
        self.patience = patience
        self.metrics = metrics
        self._recent: deque[float] = deque(maxlen=256)
        self._p95 = math.inf if patience.hedge_after is None else patience.hedge_after
        self._hedges_left = 10.0
        self._lock = threading.Lock()

    @property
    def up(self) -> bool:
        """One of them can be asked now."""
        return any(backend.up for backend in self.backends)

    def hedge_delay(self) -> float:
        return self._p95

    def may_hedge(self) -> bool:
        """Takes one hedge out of the budget, when there is one."""
        with self._lock:
            if self._hedges_left < 1:
                return False
            self._hedges_left -= 1
            return True

    def took(self, seconds: float) -> None:
        """Learns from a call that was answered."""
        with self._lock:
            self._recent.append(seconds)
            self._hedges_left = min(self._hedges_left + self.patience.hedge_share, 20.0)
            if self.patience.hedge_after is not None and len(self._recent) % 32 == 0:
                self._p95 = max(sorted(self._recent)[int(0.95 * len(self._recent))], 0.002)

    def best(self, avoid: Sequence[Backend]) -> Backend | None:
        """The replica to ask next, other than these; None when there is none."""
        candidates = [backend for backend in self.backends if backend not in avoid]
        return min(candidates, key=lambda backend: (not backend.up, backend.load, random.random()), default=None)


def ask(
    groups: Sequence[Replicas], method: str, requests: Sequence[bytes], deadline: float
) -> list[bytes | RefusedError]:
    """Asks one replica of every group, at a time.

    Args:
      groups: of which one answer each is wanted.
      method: of the service.
      requests: bytes of what each group is asked.
      deadline: of time.monotonic; nothing is waited for after it.

    Returns:
      For each group the answer's bytes, or why there is none.
    """
    # No SimpleQueue: one that a put has left unlocked waits for ever when a short timeout ends before it looks again.
    events: queue.Queue = queue.Queue()
    open_questions = [
        _Question(group, method, request, deadline, place, events, alone=len(groups) == 1)
        for place, (group, request) in enumerate(zip(groups, requests, strict=True))
    ]
    answers: list[bytes | RefusedError] = [None] * len(groups)
    while waiting := [question for question in open_questions if question.answer is None]:
        wake = min(min(question.wake for question in waiting), deadline)
        try:
            place, backend, call = events.get(timeout=max(wake - time.monotonic(), 0.0))
        except queue.Empty:  # only now, so that an answer that came in time counts
            late = time.monotonic() >= deadline
            for question in waiting:
                question.give_up() if late else question.look()
        else:
            open_questions[place].ended(backend, call)
    for place, question in enumerate(open_questions):
        question.cancel()
        answers[place] = question.answer
    return answers


class _Question:
    """One group being asked: the calls under way, and when to do something about them."""

    def __init__(
        self, group: Replicas, method: str, request: bytes, deadline: float, place: int, events: Any, *, alone: bool
    ) -> None:
        """Starts the first call; `alone` when no other group is asked meanwhile."""
        self.answer: bytes | RefusedError | None = None
        self.wake = math.inf
        self._group = group
        self._method = method
        self._request = request
        # Where there is nobody else to ask meanwhile, the thread may as well wait for the call itself.
        self._waits = alone and len(group.backends) == 1
        self._deadline = deadline
        self._place = place
        self._events = events
        self._running: dict[Backend, tuple[grpc.Future | None, float]] = {}
        self._tried: list[Backend] = []
        self._attempts = 0
        self._pause = 0.0
        self._pause_until: float | None = None
        self._hedge_at = math.inf
        self._last = "no server"
        self._last_code = grpc.StatusCode.UNAVAILABLE
        self._attempt()

    def ended(self, backend: Backend, call: grpc.Future | _Ended) -> None:
        """A call has come to its end."""
        _, started = self._running.pop(backend, (None, 0.0))
        if self.answer is not None:
            return
        code = self._last_code = call.code()
        if self._group.metrics:
            self._group.metrics.backend_requests.labels(backend.address, code.name).inc()
        if code is grpc.StatusCode.OK:
            backend.mark(True)
            self._group.took(time.monotonic() - started)
            self.answer = call.result()
            return
        self._last = f"{backend.address}: {_short(call.details())}"
        if code is grpc.StatusCode.UNAVAILABLE:
            backend.mark(False)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() >= self._deadline - 0.01:
            self.answer = RefusedError(code, f"{backend.address}: no answer in time")
        elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in (call.details() or ""):
            # gRPC's own refusal, by the same status as an overload; it will be as large the next time.
            self.answer = RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"{self._last}; ask for less at a time")
        elif code not in (*_PASSING, *_OF_THIS_SERVER):
            self.answer = RefusedError(code, _short(call.details()))
        elif not self._running:
            if not self._may_repeat():
                self.answer = RefusedError(code, self._last)
            elif self._group.best(avoid=self._tried):
                self._repeat()
            elif code in _OF_THIS_SERVER:
                self.answer = RefusedError(code, self._last)
            else:
                patience = self._group.patience
                pause = self._pause = min(2 * self._pause or patience.first_pause, patience.longest_pause)
                self._tried = []
                self._pause_until = time.monotonic() + pause * random.uniform(0.5, 1.0)
                self.wake = self._pause_until

    def look(self) -> None:
        """The time to wake may have come: the end of a pause, a hedge, or a replica that others found dead."""
        now = time.monotonic()
        if self._pause_until is not None:
            if now >= self._pause_until:
                self._repeat()
            return
        other = self._group.best(avoid=self._tried)
        if other is not None and other.up:
            if not any(backend.up for backend in self._running) and self._may_repeat():
                self._repeat()
                return
            if now >= self._hedge_at:
                self._hedge_at = math.inf
                if self._group.may_hedge():
                    if self._group.metrics:
                        self._group.metrics.hedges.inc()
                    self._launch(other)
                    return
        self.wake = min(self._hedge_at if self._hedge_at > now else math.inf, now + _LOOK_SECONDS)

    def give_up(self) -> None:
        """The deadline has come."""
        if asked := " and ".join(backend.address for backend in self._running):
            self.answer = RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, f"{asked}: no answer in time")
        else:
            self.answer = RefusedError(self._last_code, f"{self._last}; asked {self._attempts} times in vain")

    def cancel(self) -> None:
        """Ends calls whose answer is not needed any more."""
        for call, _ in list(self._running.values()):
            if call is not None:
                call.cancel()

    def _may_repeat(self) -> bool:
        return self._group.patience.attempts is None or self._attempts < self._group.patience.attempts

    def _repeat(self) -> None:
        if self._group.metrics:
            self._group.metrics.retries.inc()
        self._attempt()

    def _attempt(self) -> None:
        self._pause_until = None
        self._attempts += 1
        backend = self._group.best(avoid=self._tried) or self._group.best(avoid=())
        if backend is None:
            self.answer = RefusedError(grpc.StatusCode.UNAVAILABLE, "no server is known")
            return
        self._launch(backend)
        delay = self._group.hedge_delay()
        self._hedge_at = time.monotonic() + delay
        self.wake = time.monotonic() + min(delay, _LOOK_SECONDS)

    def _launch(self, backend: Backend) -> None:
        now = time.monotonic()
        self._tried.append(backend)
        seconds = max(self._deadline - now, 1e-3)
        if self._waits:
            self._running[backend] = (None, now)
            self._events.put((self._place, backend, backend.finish(self._method, self._request, seconds)))
            return
        call = backend.start(self._method, self._request, seconds)
        self._running[backend] = (call, now)
        self.wake = now + _LOOK_SECONDS
        call.add_done_callback(lambda call: self._events.put((self._place, backend, call)))


def _short(details: str | None) -> str:
    """What a status says, as one line of bounded length."""
    return " ".join((details or "no reason given").split())[:300]
