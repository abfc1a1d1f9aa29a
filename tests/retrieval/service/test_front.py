"""Which version a front answers from, and by whom, as shard servers come, change and go."""

import io
import json
import subprocess
import sys

import pytest

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.front import FrontSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.replicas import Patience
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.wire import Limits, RefusedError


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

    def tell(*held: tuple[str, list[int]] | None) -> str:
        """Per server: versions in order, as letters, and its shards; None for one that has said nothing new."""
        for backend, says in zip(source.backends, held, strict=True):
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
