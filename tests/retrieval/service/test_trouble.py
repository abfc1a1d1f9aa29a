"""Slow, dead, full, ending and changing servers: what was promised is kept, with real processes."""

import signal
import threading
import time

import grpc
import numpy as np
import pytest
from load import Load, queries_of
from processes_of_service import front, health, running, standin, wait_ready
from standin import World

from retro_jax.retrieval.service.client import RetrievalClient, RetrievalError
from retro_jax.retrieval.service.replicas import Patience

ONCE = Patience(attempts=1, hedge_after=None)


def test_a_slow_replica_is_hedged_and_then_avoided(start_cluster):
    with start_cluster(flags=("--hedge_ms=50",)) as cluster, RetrievalClient(cluster.front.address) as client:
        client.search(queries_of(0, 1), 2)
        cluster.delay(cluster.shards[1][0], 1.5)
        with Load(lambda queries: client.search(queries, 2)[0], 2) as load:
            load.wait(60)
        load.check(cluster.world, k=2)
        slow = [outcome for outcome in load.outcomes if outcome.seconds > 1]
        assert not slow  # nobody waited for the slow replica: the other one was asked too, then first


def test_a_slow_shard_without_a_replica_is_named_before_the_deadline(start_cluster):
    with start_cluster(replicas=1) as cluster:
        cluster.delay(cluster.shards[1][0], 2)
        with RetrievalClient(cluster.front.address, seconds=0.5, patience=ONCE) as client:
            started = time.monotonic()
            with pytest.raises(RetrievalError, match=r"shard 1 of 2: .*no answer in time") as refused:
                client.search(queries_of(0, 1), 2)
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - started < 0.6
        # The shard itself: the caller's deadline holds, and what waits behind a slow search is not begun.
        shard = cluster.shards[1][0]
        with RetrievalClient(shard.address, seconds=0.3, patience=ONCE) as client:
            started = time.monotonic()
            with pytest.raises(RetrievalError, match="no answer in time") as refused:
                client.search(queries_of(0, 1), 2)
            assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - started < 0.6


def test_late_work_is_dropped_before_the_search(tmp_path):
    World().write(tmp_path)
    server = standin(tmp_path, "0,1", slots=1)
    with running(server):
        wait_ready(server)
        (tmp_path / f"delay-{server.port}").write_text("0.6")
        with RetrievalClient(server.address, seconds=5, patience=ONCE) as patient:
            first = threading.Thread(target=lambda: patient.search(queries_of(0, 1), 2))
            first.start()
            with RetrievalClient(server.address, seconds=0.2, patience=ONCE) as hasty:
                for _ in range(2):
                    with pytest.raises(RetrievalError):
                        hasty.search(queries_of(1, 1), 2)
            first.join()
            started = time.monotonic()
            patient.search(queries_of(2, 1), 2)
            assert time.monotonic() - started < 1.1  # behind nothing: the two hasty ones were never searched
        assert server.end() == 0


def test_a_dead_shard_is_named_and_partial_answers_only_on_request_and_marked(start_cluster):
    with start_cluster(replicas=1) as cluster:
        cluster.shards[1][0].kill()
        with RetrievalClient(cluster.front.address, patience=ONCE) as client:
            with pytest.raises(RetrievalError, match=r"shard 1 of 2: 127.0.0.1:\d+: ") as refused:
                client.search(queries_of(0, 4), 3)
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        with RetrievalClient(cluster.front.address, allow_partial=True) as client:
            found = client.search_found(queries_of(0, 4), 3)
        np.testing.assert_array_equal(found.ids, cluster.world.search(queries_of(0, 4), 3, shards=[0])[0])
        assert found.missing_shards == (1,)
        assert health(cluster.front.address) == "SERVING"  # it is the one that says which shard is dead


def test_kill_9_of_a_replica_under_load_loses_no_request_and_it_may_come_back(start_cluster):
    with start_cluster() as cluster, RetrievalClient(cluster.front.address) as client:
        killed, other = cluster.shards[0]
        with Load(lambda queries: client.search(queries, 2)[0], 4) as load:
            load.wait(40)
            killed.kill()
            load.wait(80)
            again = standin(cluster.directory, "0", port=killed.port)
            wait_ready(again)
            load.wait(20)
            other.kill()
            load.wait(80)
        with running(again):
            assert again.end() == 0
        load.check(cluster.world, k=2)
        assert max(outcome.seconds for outcome in load.outcomes) < 5


def test_a_replica_that_hangs_loses_no_request(start_cluster):
    with start_cluster() as cluster, RetrievalClient(cluster.front.address) as client:
        with Load(lambda queries: client.search(queries, 2)[0], 4) as load:
            load.wait(40)
            cluster.shards[0][0].signal(signal.SIGSTOP)
            load.wait(200)
            cluster.shards[0][0].signal(signal.SIGCONT)
        load.check(cluster.world, k=2)
        assert max(outcome.seconds for outcome in load.outcomes) < 5


def test_a_front_that_restarts_ends_no_client_s_work(start_cluster):
    with start_cluster(replicas=1) as cluster, RetrievalClient(cluster.front.address) as client:
        address, port = cluster.front.address, cluster.front.port
        with Load(lambda queries: client.search(queries, 2)[0], 2) as load:
            load.wait(10)
            cluster.front.kill()
            again = front(*(group[0] for group in cluster.shards), flags=(f"--port={port}",))
            with running(again):
                wait_ready(again)
                load.wait(20)
                load.stop()
        load.check(cluster.world, k=2)
        # Whether anybody is there at all is known long before the deadline.
        started = time.monotonic()
        with pytest.raises(RetrievalError, match="UNAVAILABLE"), RetrievalClient(address, seconds=60) as lost:
            lost.search(queries_of(0, 1), 2)
        assert time.monotonic() - started < 20


def test_sigterm_drains(start_cluster):
    with start_cluster() as cluster, RetrievalClient(cluster.front.address) as client:
        with Load(lambda queries: client.search(queries, 2)[0], 4) as load:
            load.wait(40)
            for server in (cluster.shards[0][0], cluster.shards[1][0]):
                assert server.end() == 0
            load.wait(40)
        load.check(cluster.world, k=2)


def test_a_request_under_way_is_finished_after_sigterm(tmp_path):
    World().write(tmp_path)
    server = standin(tmp_path, "0,1", drain_delay=0.3)
    with running(server):
        wait_ready(server)
        (tmp_path / f"delay-{server.port}").write_text("1.0")
        with (
            RetrievalClient(server.address, patience=ONCE) as client,
            Load(lambda queries: client.search(queries, 2)[0], 2) as load,
        ):
            while not (tmp_path / f"searching-{server.port}").exists():
                time.sleep(0.01)
            server.signal(signal.SIGTERM)
            server.event("draining")
            assert health(server.address) == "NOT_SERVING" and health(server.address, "liveness") == "SERVING"
            load._stop.set()
        load.check(World(), k=2)
        assert server.process.wait(10) == 0


def test_load_beyond_capacity_is_shed_and_what_is_accepted_stays_quick(tmp_path):
    World().write(tmp_path)
    server = standin(tmp_path, "0,1", slots=1, queue_requests=3)
    with running(server):
        wait_ready(server)
        (tmp_path / f"delay-{server.port}").write_text("0.05")
        with RetrievalClient(server.address, patience=ONCE) as client:
            with Load(lambda queries: client.search(queries, 2)[0], 40) as load:
                load.wait(400)
                assert health(server.address, "liveness") == "SERVING"
            shed = [outcome for outcome in load.outcomes if outcome.error]
            accepted = [outcome for outcome in load.outcomes if not outcome.error]
            assert {outcome.error.code for outcome in shed} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert "the queue is full" in str(shed[0].error)
            assert len(shed) > 200 and len(accepted) > 5
            # Three wait before it at most; forty would take two seconds.
            assert sorted(o.seconds for o in accepted)[int(0.9 * len(accepted))] < 1
            (tmp_path / f"delay-{server.port}").unlink()
            for seed in range(20):  # it has recovered by itself
                assert np.array_equal(
                    client.search(queries_of(seed, 1), 2)[0], World().search(queries_of(seed, 1), 2)[0]
                )


def test_a_new_version_takes_over_without_a_failed_or_a_mixed_answer(start_cluster):
    old, new = World(seed=1), World(seed=2, chunks=500)
    options = {"reload_seconds": 0.5, "keep_seconds": 1.5}
    with start_cluster(world=old, **options) as cluster:
        address = cluster.front.address

        def search(queries):
            with RetrievalClient(address) as fresh:
                return fresh.search(queries, 2)[0]

        with RetrievalClient(address) as pinned, Load(search, 2) as load:
            load.wait(20)
            assert pinned.fingerprint == "world1"
            new.write(cluster.directory)
            while RetrievalClient(address).fingerprint != "world2":
                # Asked for all the time, the old version stays.
                assert np.array_equal(pinned.search(queries_of(0, 2), 2)[0], old.search(queries_of(0, 2), 2)[0])
            load.wait(20)
            assert np.array_equal(pinned.search(queries_of(0, 2), 2)[0], old.search(queries_of(0, 2), 2)[0])
        load.check(old, new, k=2)
        last = load.outcomes[-1]
        assert np.array_equal(last.ids, new.search(queries_of(last.seed, 3), 2)[0])
        for server in (server for group in cluster.shards for server in group):
            assert server.event("released")["database"] == "world1"
        with RetrievalClient(address, database="world1") as pinned, pytest.raises(RetrievalError) as refused:
            while True:
                pinned.search(queries_of(0, 2), 2)
        assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


def test_a_damaged_new_version_is_refused_and_the_old_one_answers_on(tmp_path):
    World().write(tmp_path)
    server = standin(tmp_path, "0,1", reload_seconds=0)
    with running(server):
        wait_ready(server)
        (tmp_path / "world.new").write_text("damaged")
        (tmp_path / "world.new").rename(tmp_path / "world.json")
        server.signal(signal.SIGHUP)
        assert "checksum differs" in server.event("reload failed")["reason"]
        with RetrievalClient(server.address) as client:
            assert client.search(queries_of(0, 1), 1)[0].tolist() == World().search(queries_of(0, 1), 1)[0].tolist()
        assert server.end() == 0
