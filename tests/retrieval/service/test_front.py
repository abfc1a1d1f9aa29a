"""Which version a front answers from, and by whom, as shard servers come, change and go."""

import io
import json
import subprocess
import sys
import time
from concurrent.futures import Future

import grpc
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval.service import front as front_module
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.client import RetrievalClient
from retro_jax.retrieval.service.front import FrontSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.replicas import Backend, Patience, check_addresses
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.wire import Limits, Query, RefusedError


@pytest.fixture
def front():
    """A front of four servers that nobody asks; `tell` says what each holds."""
    log = io.StringIO()
    source = FrontSource(
        [f"127.0.0.1:{port}" for port in range(1, 5)],
        security=ClientSecurity(),
        patience=Patience(),
        limits=Limits(),
        log=Log(log),
        metrics=Metrics(),
    )

    def tell(*held: tuple[str, list[int]] | None, down: str = "") -> str:
        """Per server: versions in order, as letters, and its shards; None for one that has said nothing new.

        `down` has the places of those that do not answer any more.
        """
        for place, (backend, says) in enumerate(zip(source.backends, held, strict=True)):
            backend.mark(str(place) not in down, 60)
            if says is not None:
                versions = [pb.Version(database=name, num_shards=2, shards=says[1]) for name in says[0]]
                source._descriptions[backend] = pb.DescribeResponse(versions=versions)
        source._renew()
        return source._current

    source.tell, source.lines = tell, log
    yield source
    source.close()


def test_it_answers_when_every_shard_has_a_server(front):
    assert front.tell(("a", [0]), ("a", [0]), None, None) == ""
    with pytest.raises(RefusedError, match="of 2 shards of database a no server holds 1"):
        front.version("")
    assert front.tell(None, None, ("a", [1]), None) == "a"
    assert list(front.version("").shards) == [0, 1]
    groups = front._offers["a"].groups
    assert [(group.shards, len(group.replicas.backends)) for group in groups] == [((0,), 2), ((1,), 1)]
    with pytest.raises(RefusedError, match="answers from database a, not from z"):
        front.version("z")


def test_a_new_version_takes_over_when_every_shard_has_it_and_goes_back_the_same_way(front):
    assert front.tell(("a", [0]), ("a", [0]), ("a", [1]), ("a", [1])) == "a"
    assert front.tell(("ab", [0]), None, None, None) == "a"
    assert front.tell(None, ("ab", [0]), None, None) == "a"
    assert front.tell(None, None, ("ab", [1]), None) == "b"  # the last one follows
    assert [version.database for version in front.versions()] == ["a", "b"]
    assert front.tell(("ba", [0]), ("ba", [0]), None, ("ab", [1])) == "b"  # back to a: not everybody yet
    assert front.tell(None, None, ("ba", [1]), ("ba", [1])) == "a"
    events = [json.loads(line) for line in front.lines.getvalue().splitlines()]
    assert [event["database"] for event in events if event["event"] == "answers"] == ["a", "b", "a"]


def test_servers_that_all_were_restarted_with_another_database_are_followed(front):
    assert front.tell(("a", [0]), None, ("a", [1]), None) == "a"
    assert front.tell(("b", [0]), None, None, None) == "a"
    assert front.tell(None, None, ("b", [1]), None) == "b"
    assert front.tell(("c", [0]), None, ("d", [0]), None) == ""
    assert front.versions() == []


def test_overlapping_parts_are_used_once(front):
    assert front.tell(("a", [0, 1]), ("a", [0]), ("a", [1]), None) == "a"
    assert [group.shards for group in front._offers["a"].groups] == [(0, 1)]
    assert '"event": "overlap"' in front.lines.getvalue()


def test_parts_that_answer_are_preferred_to_a_wider_one_that_does_not(front):
    servers = ("a", [0, 1]), ("a", [0]), ("a", [1]), None
    assert front.tell(*servers, down="0") == "a"
    assert [group.shards for group in front._offers["a"].groups] == [(0,), (1,)]
    assert front.tell(*servers, down="02") == "a"  # the whole is not there either: shard 1 is dead, and is named so
    assert front._offers["a"].silent == [1] and front._offers["a"].missing == []
    assert front.tell(*servers) == "a"
    assert [group.shards for group in front._offers["a"].groups] == [(0, 1)]


def test_a_version_whose_servers_are_gone_is_left_for_one_that_answers(front):
    servers = ("a", [0]), ("a", [1]), ("b", [0]), ("b", [1])
    assert front.tell(*servers, down="23") == "a"
    assert front.tell(*servers) == "a"
    assert front.tell(*servers, down="03") == "a"  # nothing is whole: it stays, and names the dead shard
    assert front.tell(*servers, down="0") == "b"
    assert front.tell(*servers) == "b"
    assert front.version("a").database == "a"  # for who has named it


def test_it_goes_back_to_an_earlier_version_only_when_nobody_has_the_later_one(front):
    front.tell(("ab", [0]), ("ab", [1]), ("a", [0]), ("a", [1]))
    assert front.tell(None, None, None, None) == "b"
    assert front.tell(None, None, None, None, down="0") == "b"  # one of two: documents may have been removed since a
    assert front.tell(None, None, None, None, down="01") == "a"
    assert front.tell(None, None, None, None) == "b"


def test_what_gone_servers_said_last_does_not_hold_the_others_back(front):
    assert front.tell(("ab", [0]), ("ab", [0]), ("ab", [1]), ("ab", [1])) == "b"
    assert front.tell(None, ("ba", [0]), ("ba", [1]), ("ba", [1])) == "b"  # server 0 says that b is the later one
    assert front.tell(None, ("ba", [0]), ("ba", [1]), ("ba", [1]), down="0") == "a"


def test_a_server_that_still_loads_is_not_asked_and_its_shard_is_named(front, monkeypatch):
    says = {}

    def start(backend: Backend, *_: object) -> Future:
        answered = Future()
        answered.code = lambda: grpc.StatusCode.OK
        answered.set_result(says[backend].SerializeToString())
        return answered

    monkeypatch.setattr(Backend, "start", start)
    versions = [[pb.Version(database="a", num_shards=2, shards=[place % 2])] for place in range(4)]
    for backend, held in zip(front.backends, versions, strict=True):
        says[backend] = pb.DescribeResponse(versions=held)
    front.poll()
    assert front.version("").database == "a" and front._offers["a"].silent == []
    for backend in front.backends[::2]:
        says[backend] = pb.DescribeResponse()  # restarted
    for _ in range(2):
        front.poll()
        assert front._offers["a"].silent == [0] and front.ready
        assert [backend.up for backend in front.backends] == [False, True] * 2
    events = [json.loads(line) for line in front.lines.getvalue().splitlines()]
    told = [(event["event"], event.get("reason")) for event in events if event["event"].startswith("backend")]
    assert told == [("backend up", None)] * 4 + [("backend down", "loading")] * 2


def test_time_is_kept_back_to_say_who_did_not_answer(front, monkeypatch):
    deadlines = []

    def nobody(groups: list, method: str, requests: list[bytes], deadline: float) -> list[RefusedError]:
        deadlines.append(deadline)
        reason = f"{groups[0].backends[0].address}: no answer in time"
        return [RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, reason)] * len(groups)

    monkeypatch.setattr(front_module, "ask", nobody)
    front.tell(("a", [0, 1]), None, None, None)
    ids, query = np.zeros(3, np.int64), Query(np.zeros((3, 8), np.float32), 1, None)
    for seconds, most in ((1.0, 0.1), (1000.0, 0.25)):
        deadline = time.monotonic() + seconds
        for asked in (
            lambda until: front.search("", query, until),
            lambda until: front.neighbour_tokens("", ids, until),
            lambda until: front.documents("", ids, until),
        ):
            with pytest.raises(RefusedError, match=r"127\.0\.0\.1:1: no answer in time") as refused:
                asked(deadline)
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert 0 < deadline - deadlines.pop() <= most + 1e-6


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [
        (["localhost"], "HOST:PORT, several with commas, not 'localhost'"),
        (["127.0.0.1:1", ""], "not ''"),
        ([], "not ''"),
        (["127.0.0.1:port"], "not '127.0.0.1:port'"),
        (["127.0.0.1:0"], "not '127.0.0.1:0'"),
        (["http://127.0.0.1:1"], "not 'http://127.0.0.1:1'"),
        (["::1:50051"], "not '::1:50051'"),
        (["[::1]:1", "host:2", "[::1]:1"], r"\[::1\]:1 is given twice; a server is no replica of itself"),
    ],
)
def test_addresses_are_those_of_different_servers(addresses, reason):
    with pytest.raises(UserError, match=reason):
        check_addresses(addresses, "a shard server (--backends)")
    with pytest.raises(UserError, match=reason):
        RetrievalClient(addresses)
    check_addresses(["[::1]:1", "host-1.domain:50051", "127.0.0.1:65535"], "a server")


def test_a_front_and_a_client_need_neither_scann_nor_jax():
    blocked = "import sys\nfor name in ('jax', 'scann', 'tensorflow', 'apache_beam'): sys.modules[name] = None\n"
    program = "import runpy; runpy.run_path('launch/serve_retrieval.py', run_name='not_main')\n"
    result = subprocess.run(
        [sys.executable, "-c", f"{blocked}{program}import retro_jax.retrieval.service.client"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
