"""Who is asked first, and how many hedges there may be."""

import time

import grpc
import pytest

from retro_jax.retrieval.service.replicas import Backend, Patience, Replicas, _Ended, ask
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.wire import RefusedError


@pytest.fixture
def replicas():
    """Three servers that are not there."""
    backends = [Backend(f"127.0.0.1:{port}", ClientSecurity(), 1 << 20) for port in (1, 2, 3)]
    patience = Patience(attempts=5, first_pause=0.001, hedge_after=0.1, hedge_share=0.05)
    yield Replicas("three", backends, patience, None)
    for backend in backends:
        backend.close()


def test_the_quick_one_with_little_to_do_is_asked_and_one_that_is_down_only_in_need(replicas):
    quick, slow, down = replicas.backends
    for backend, seconds in ((quick, 0.01), (slow, 0.1), (down, 0.001)):
        backend._seconds, backend._measured = seconds, time.monotonic()
    down.mark(False, 60)
    assert replicas.best(avoid=()) is quick
    quick.outstanding = 20
    assert replicas.best(avoid=()) is slow
    assert replicas.best(avoid=(quick, slow)) is down
    assert replicas.best(avoid=replicas.backends) is None
    down.mark(True)
    assert replicas.best(avoid=()) is down
    slow._measured -= 60  # what is long ago says nothing any more
    assert replicas.best(avoid=(down,)) is slow


def test_hedges_are_a_share_of_the_calls(replicas):
    assert [replicas.may_hedge() for _ in range(12)] == [True] * 10 + [False] * 2
    for _ in range(45):
        replicas.took(0.01)
    assert [replicas.may_hedge() for _ in range(3)] == [True, True, False]
    assert replicas.hedge_delay() == 0.01  # the 95th percentile takes the place of the first guess
    for _ in range(10_000):
        replicas.took(0.01)
    assert sum(replicas.may_hedge() for _ in range(100)) == 20


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_without_a_bound_what_passes_is_waited_for_until_the_deadline(replicas, monkeypatch, code):
    asked, pauses = [], []
    answers = [_Ended(b"", code, "full")] * 2000 + [_Ended(b"found", grpc.StatusCode.OK, "")]
    monkeypatch.setattr(Backend, "finish", lambda *_: asked.append(1) or answers[len(asked) - 1])
    monkeypatch.setattr("random.uniform", lambda low, high: pauses.append(high) or 1e-6)
    patience = Patience(attempts=None, first_pause=0.02, longest_pause=1.0)
    one = Replicas("one", replicas.backends[:1], patience, None)
    assert ask([one], "Search", [b""], time.monotonic() + 60) == [b"found"]
    assert len(asked) == 2001
    answers = [_Ended(b"", code, "full")] * 10**6
    (answer,) = ask([one], "Search", [b""], time.monotonic() + 0.05)
    assert answer.code is code and answer.reason.startswith("127.0.0.1:1: full; asked ")


def test_attempts_are_bounded_and_the_last_reason_is_told(replicas):
    started = time.monotonic()
    (answer,) = ask([replicas], "Search", [b""], time.monotonic() + 20)
    assert isinstance(answer, RefusedError) and answer.code.name == "UNAVAILABLE"
    assert "127.0.0.1:" in answer.reason and "refused" in answer.reason
    assert time.monotonic() - started < 10
