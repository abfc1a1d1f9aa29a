"""Processes meet, know each other's hosts, and notice an end at once; without JAX."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from retro_jax.errors import TemporaryError, UserError
from retro_jax.parallel.roll_call import Address, meet

MEMBER = """
import json, sys, time
from retro_jax.parallel.roll_call import Address, meet

def stop(reason, temporary):
    print(reason, flush=True)
    import os
    os._exit(75 if temporary else 1)

port, process, of = map(int, sys.argv[1:4])
roll_call = meet(Address("127.0.0.1", port), process, of, 60)
roll_call.watch(stop)
print(json.dumps(roll_call.hosts), flush=True)
order = sys.stdin.readline().strip()
if order == "leave":
    roll_call.leave()
elif order == "fail":
    roll_call.fail("the disk is full")
elif order == "wait":
    roll_call.fail("the workdir is in use", temporary=True)
"""


@pytest.fixture
def port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def member(port, process, of):
    return subprocess.Popen(
        [sys.executable, "-c", MEMBER, str(port), str(process), str(of)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def members(port, count):
    """Processes that have met."""
    all_of_them = [member(port, process, count) for process in range(count)]
    for one in all_of_them:
        assert json.loads(one.stdout.readline()) == [socket.gethostname()] * count
    return all_of_them


def order(process, what):
    process.stdin.write(what + "\n")
    process.stdin.flush()


def meet_all(port, calls, timeout=20.0):
    """Meets from threads: calls are (process, of); gives the results or UserErrors."""

    def one(call):
        try:
            return meet(Address("127.0.0.1", port), *call, timeout)
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_all_come_in_any_order_and_leave_together(port):
    last = member(port, 2, 3)  # before there is anybody to talk to
    first, second = member(port, 0, 3), member(port, 1, 3)
    for one in (first, second, last):
        assert json.loads(one.stdout.readline()) == [socket.gethostname()] * 3
    order(second, "leave")
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the others
        second.wait(timeout=0.3)
    order(first, "leave")
    order(last, "leave")
    assert [one.wait(timeout=20) for one in (first, second, last)] == [0, 0, 0]


@pytest.mark.parametrize("victim", [0, 2])
def test_the_death_of_one_ends_the_others_at_once_and_is_named(port, victim):
    processes = members(port, 4)
    processes[victim].kill()
    killed = time.monotonic()
    for process in processes:
        if process is not processes[victim]:
            assert process.wait(timeout=20) == 75
            expected = f"process {victim} ({socket.gethostname()}) has stopped or cannot be reached"
            assert process.stdout.read().strip() == expected
    assert time.monotonic() - killed < 5
    assert processes[victim].wait() == -signal.SIGKILL


def test_a_failure_is_told_to_all_with_its_reason(port):
    processes = members(port, 3)
    order(processes[1], "fail")
    for process in (processes[0], processes[2]):
        assert process.wait(timeout=20) == 1
        assert process.stdout.read().strip() == f"process 1 ({socket.gethostname()}) failed: the disk is full"


def test_a_failure_that_may_pass_ends_all_in_that_way(port):
    processes = members(port, 3)
    order(processes[2], "wait")
    for process in processes[:2]:
        assert process.wait(timeout=20) == 75
        assert process.stdout.read().strip() == f"process 2 ({socket.gethostname()}) failed: the workdir is in use"


def test_a_loss_that_is_told_in_the_same_packet_as_the_meeting_is_named(port):
    told, stopped = [], threading.Event()

    def stop(reason, temporary):
        told.append((reason, temporary))
        stopped.set()

    with socket.create_server(("127.0.0.1", port)) as listener, concurrent.futures.ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(meet, Address("127.0.0.1", port), 1, 3, 20)
        first = listener.accept()[0]
        with first:
            first.recv(1 << 16)
            first.sendall(b'{"hosts": ["a", "b", "c"]}\n{"gone": 2}\n')
            meeting.result(timeout=20).watch(stop)
            assert stopped.wait(timeout=20)
    assert told == [("process 2 (c) has stopped or cannot be reached", True)]


def test_one_that_has_left_is_not_missed_but_one_that_dies_while_others_leave_is(port):
    processes = members(port, 3)
    for process in (processes[0], processes[2]):
        order(process, "leave")
    processes[1].kill()
    for process in (processes[0], processes[2]):
        assert process.wait(timeout=20) == 75
        assert process.stdout.read().startswith("process 1 (")


def test_the_port_is_free_for_jax_after_the_meeting(port):
    processes = members(port, 2)
    with socket.create_server(("127.0.0.1", port)):
        pass
    for process in processes:
        process.kill()
        process.communicate()


def test_the_missing_are_named_to_those_that_came(port):
    found = meet_all(port, [(0, 4), (2, 4)], timeout=2.0)
    host = socket.gethostname()
    for error in found:
        assert f"number 1, 3 did not come to 127.0.0.1:{port} within 2 s" in str(error)
        assert f"(there are: 0 on {host}, 2 on {host})" in str(error)
        assert isinstance(error, TemporaryError)


def test_a_coordinator_that_is_not_there_is_named(port):
    (error,) = meet_all(port, [(1, 2)], timeout=1.0)
    assert f"process 0, cannot be reached at 127.0.0.1:{port} within 1 s (Connection refused)" in str(error)
    assert "see that it runs, that the address is its host's, and that no firewall" in str(error)
    assert isinstance(error, TemporaryError)


def test_a_host_name_that_nobody_knows_is_named():
    with pytest.raises(TemporaryError, match=r"cannot be reached at nowhere\.invalid:1 within 0\.5 s"):
        meet(Address("nowhere.invalid", 1), 1, 2, 0.5)


def test_a_port_in_use_is_named(port):
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"cannot listen at port {port}") as caught:
        meet(Address("127.0.0.1", port), 0, 2, 5)
    assert "in use" in str(caught.value) and not isinstance(caught.value, TemporaryError)


def test_two_with_one_number_and_other_counts_are_refused(port):
    found = meet_all(port, [(0, 3), (1, 3), (1, 3)], timeout=3.0)
    assert sum(f"two processes have the number 1: on {socket.gethostname()}" in str(error) for error in found) == 1
    assert sum("number 2 did not come" in str(error) for error in found) == 2
    found = meet_all(port, [(0, 2), (1, 3)], timeout=2.0)
    assert "process 1" in str(found[1]) and "was told of 3 processes, process 0" in str(found[1])
    assert not isinstance(found[1], TemporaryError)


def test_other_connections_do_not_disturb_the_meeting(port):
    met = []
    first = threading.Thread(target=lambda: met.extend(meet_all(port, [(0, 2)])))
    first.start()
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": "x"}\n', b"[1]\n", b"\xff\n"):
        deadline = time.monotonic() + 10
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=1)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        with stranger:
            stranger.sendall(noise)
    second = meet(Address("127.0.0.1", port), 1, 2, 20)
    first.join(timeout=20)
    assert second.hosts == met[0].hosts


def test_one_that_was_started_again_while_others_were_awaited_takes_its_place(port):
    waiting = member(port, 1, 3)
    first = member(port, 0, 3)
    time.sleep(1)  # process 1 is there by now; whether or not, the three must meet
    waiting.kill()
    waiting.communicate()
    again, last = member(port, 1, 3), member(port, 2, 3)
    members = (first, again, last)
    assert [json.loads(one.stdout.readline()) for one in members] == [[socket.gethostname()] * 3] * 3
    for one in members:
        one.kill()
        one.communicate()
