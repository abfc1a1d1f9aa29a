"""The relay passes everything on but the coordinator's end, and leaves no process behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from retro_jax.parallel.relay import LOOPBACK, Relay


@pytest.fixture
def coordinator():
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(20)
        yield listener


@pytest.fixture
def relay(coordinator):
    with contextlib.closing(Relay(LOOPBACK, coordinator.getsockname()[1], 20)) as opened:
        yield opened


def connect(relay):
    host, port = relay.address.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def received(connection, count):
    with connection.makefile("rb") as stream:
        return stream.read(count)


def test_bytes_pass_in_both_directions_for_every_connection(coordinator, relay):
    for _ in range(3):
        with connect(relay) as near, coordinator.accept()[0] as far:
            far.settimeout(20)
            sent = os.urandom(1 << 15)
            near.sendall(sent)
            far.sendall(sent[::-1])
            assert received(far, len(sent)) == sent
            assert received(near, len(sent)) == sent[::-1]


def test_the_near_end_is_passed_on_and_the_far_end_is_not(coordinator, relay):
    near = connect(relay)
    far = coordinator.accept()[0]
    far.settimeout(20)
    near.close()
    assert far.recv(1) == b""
    with connect(relay) as near:
        coordinator.accept()[0].close()
        near.settimeout(0.5)
        with pytest.raises(TimeoutError):  # b"" would be the end
            near.recv(1)


def test_a_coordinator_that_comes_later_is_waited_for(coordinator):
    address = coordinator.getsockname()
    coordinator.close()
    with contextlib.closing(Relay(*address, 20)) as relay, connect(relay) as near:
        near.sendall(b"early")
        with socket.create_server(address) as late:
            late.settimeout(20)
            assert received(late.accept()[0], 5) == b"early"


def test_a_coordinator_that_does_not_come_ends_the_connection(coordinator):
    address = coordinator.getsockname()
    coordinator.close()
    with contextlib.closing(Relay(*address, 0.3)) as relay, connect(relay) as near:
        assert near.recv(1) == b""


def test_it_outlives_signals_to_the_whole_job_but_not_its_owner():
    owner = (
        "import sys, time; from retro_jax.parallel.relay import Relay;"
        "relay = Relay('127.0.0.1', 1, 60); print(relay._process.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)
    os.kill(pid, 0)  # still there
    process.kill()
    process.communicate(timeout=20)  # ends when the last that holds stderr has gone, and that is the relay
