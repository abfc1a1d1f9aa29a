"""Metrics count what happened, on a port of their own; logs tell it without a word of what was asked."""

import json
import urllib.request

import grpc
import numpy as np
import pytest
from processes_of_service import front, running, standin, wait_ready
from prometheus_client.parser import text_string_to_metric_families
from standin import World

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.client import RetrievalClient, RetrievalError
from retro_jax.retrieval.service.replicas import Patience

SECRET = "a very private sentence"


def scrape(server) -> dict[tuple, float]:
    """(name, values of the labels in alphabetical order of their names) -> value."""
    url = f"http://{server.event('listening')['metrics']}/metrics"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (
            sample.name.removeprefix("retro_retrieval_"),
            *(value for _, value in sorted(sample.labels.items())),
        ): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    World(num_shards=1).write(directory)
    shard = standin(directory, "0", metrics_port=0, slots=1, queue_requests=0, recall_seconds=0.1)
    with running(shard):
        asking = front(shard, flags=("--metrics_port=0", "--log_requests"))
        with running(asking):
            wait_ready(shard, asking)
            yield directory, asking, shard


def test_metrics_count_requests_shards_and_trouble(served):
    directory, asking, shard = served
    queries = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    before = scrape(asking), scrape(shard)
    with RetrievalClient(asking.address, patience=Patience(attempts=1)) as client:
        for _ in range(4):
            client.search(queries, 2)
        with pytest.raises(RetrievalError, match="k is 0"):
            client.search(queries, 0)
        (directory / f"delay-{shard.port}").write_text("0.5")
        with RetrievalClient(asking.address, patience=Patience(attempts=1), concurrent=1) as second:
            running_search = second._pool.submit(second.search, queries, 2)
            while not (directory / f"searching-{shard.port}").exists():
                assert not running_search.done()
            with pytest.raises(RetrievalError, match="the queue is full") as shed:
                client.search(queries, 2)
            running_search.result()
        assert shed.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        told = [server.event("Search RESOURCE_EXHAUSTED")["request"] for server in (asking, shard)]
        assert told[0] == told[1]  # one request, by one name in all logs
    after = scrape(asking), scrape(shard)

    def counted(place: int, *key: str) -> float:
        return after[place].get(key, 0) - before[place].get(key, 0)

    assert counted(0, "requests_total", "OK", "Search") == 5
    assert counted(0, "requests_total", "INVALID_ARGUMENT", "Search") == 1
    assert counted(0, "requests_total", "RESOURCE_EXHAUSTED", "Search") == 1
    assert counted(0, "backend_requests_total", shard.address, "OK") == 5
    assert counted(0, "request_seconds_count", "Search") == 7
    assert counted(0, "queries_sum") == 30
    assert counted(1, "shed_total") >= 1 and counted(1, "requests_total", "OK", "Search") == 5
    assert after[0]["backend_up", shard.address] == 1
    for values in after:
        assert values["database_info", "corpus", "world1", "embedder"] == 1
        assert values["recall",] == 0.96875
        assert values["queue_requests",] == values["running_requests",] == 0
        assert values["process_resident_memory_bytes", ] > 1e7  # fmt: skip


def test_logs_are_json_and_hold_nothing_of_the_request(served):
    _, asking, shard = served
    with grpc.insecure_channel(asking.address) as channel:
        call = channel.unary_unary("/retro_jax.retrieval.v1.Retrieval/Search")
        request = pb.SearchRequest(texts=pb.Texts(values=[SECRET]), k=3)
        for metadata in ((("x-request-id", "my-request"),), (("x-request-id", SECRET * 9),)):
            with pytest.raises(grpc.RpcError):
                call(request.SerializeToString(), timeout=10, metadata=metadata)
        with pytest.raises(grpc.RpcError):
            call(SECRET.encode(), timeout=10)
    with RetrievalClient(asking.address) as client:
        client.search(np.ones((1, 8), np.float32), 1)
    assert asking.event("Search OK")["bytes"] > 32
    refused = asking.event("Search FAILED_PRECONDITION")
    assert refused["request"] == "my-request" and refused["ms"] > 0 and "--embedder" in refused["reason"]
    for server in (asking, shard):
        lines = [line for line in server.lines if line]
        assert lines and all({"time", "level", "event"} <= json.loads(line).keys() for line in lines)
        assert "private" not in "".join(lines)


def test_a_metrics_port_in_use_is_named(served, tmp_path):
    _, asking, _ = served
    port = asking.event("listening")["metrics"].rpartition(":")[2]
    World().write(tmp_path)
    second = standin(tmp_path, "0", metrics_port=port)
    with running(second):
        assert second.process.wait(30) == 1
        assert (
            f"error: metrics cannot listen at 127.0.0.1:{port}: port in use; give another --metrics_port\n"
            in second.lines
        )
