"""The queue never holds more than its bounds, serves in order, and loses no slot whatever callers do."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.retrieval.service.admission import Admission, QueueFullError, Ticket, TooLateError


def test_what_does_not_fit_is_refused_at_once_and_the_rest_is_served_in_order():
    admission = Admission(1, requests=2, queries=10)
    served = []

    def work(name, queries):
        with admission.slot(Ticket(queries), 30):
            served.append(name)

    with admission.slot(Ticket(1), 30):
        threads = []
        for name, queries in (("first", 4), ("second", 6)):
            threads.append(threading.Thread(target=work, args=(name, queries)))
            threads[-1].start()
            while admission.waiting < len(threads):
                time.sleep(0.001)
        assert (admission.running, admission.waiting, admission.waiting_queries) == (1, 2, 10)
        with pytest.raises(QueueFullError), admission.slot(Ticket(1), 30):
            pass
    for thread in threads:
        thread.join()
    assert served == ["first", "second"]
    assert (admission.running, admission.waiting, admission.waiting_queries) == (0, 0, 0)


def test_one_large_request_may_wait_and_a_second_one_may_not():
    admission = Admission(1, requests=5, queries=10)
    with admission.slot(Ticket(1), 30):
        ticket = Ticket(1000)

        def wait():
            with pytest.raises(TooLateError), admission.slot(ticket, 30):
                pass

        waiting = threading.Thread(target=wait)
        waiting.start()
        while not admission.waiting:
            time.sleep(0.001)
        with pytest.raises(QueueFullError), admission.slot(Ticket(1), 30):
            pass
        ticket.cancel()
        waiting.join()
        assert admission.waiting_queries == 0
        with pytest.raises(TooLateError), admission.slot(Ticket(1), 0.01):
            pass


@given(st.integers(1, 3), st.integers(0, 4), st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=12))
@settings(deadline=None, max_examples=25)
def test_slots_are_never_exceeded_nor_lost(slots, requests, callers):
    admission = Admission(slots, requests=requests, queries=8)
    running, most = 0, 0
    lock = threading.Lock()

    def call(queries, kind):
        nonlocal running, most
        ticket = Ticket(queries)
        if kind == 1:
            threading.Timer(0.001, ticket.cancel).start()
        try:
            with admission.slot(ticket, 0.0005 if kind == 2 else 10):
                with lock:
                    running += 1
                    most = max(most, running)
                time.sleep(0.0005)
                with lock:
                    running -= 1
                if kind == 3:
                    raise RuntimeError
        except (QueueFullError, TooLateError, RuntimeError):
            pass

    threads = [threading.Thread(target=call, args=caller) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= slots
    assert (admission.running, admission.waiting, admission.waiting_queries) == (0, 0, 0)
