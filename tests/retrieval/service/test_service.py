"""The service answers as the database itself would, through shards and a front, and says what it serves."""

import grpc
import numpy as np
import pytest
from processes_of_service import health, running, standin
from standin import World

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.client import RetrievalClient, RetrievalError


@pytest.mark.parametrize("k", [1, 2, 30, 700])
def test_answers_are_those_of_the_whole_database(cluster, client, queries, k):
    queries[3] = 0  # a chunk without word pieces finds nothing
    keys = np.random.default_rng(k).integers(-1, 120, (len(queries), 2))
    for exclude in (None, keys, keys[:, 0]):
        ids, distances = client.search(queries, k, exclude)
        expected = cluster.world.search(queries, k, None if exclude is None else exclude.reshape(len(queries), -1))
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(distances, expected[1])
        assert (ids[3] == -1).all() and np.isinf(distances[3]).all()


def test_a_search_larger_than_a_request_is_sent_in_parts(start_cluster):
    with start_cluster(replicas=1, flags=("--max_queries=7",)) as small:
        queries = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
        keys = np.arange(40)
        with RetrievalClient(small.front.address, concurrent=3) as client:
            ids, distances = client.search(queries, 3, keys)
            none = client.search(queries[:0], 3)
        expected = small.world.search(queries, 3, keys[:, None])
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_array_equal(distances, expected[1])
        assert none[0].shape == (0, 3)


def test_chunks_and_documents_come_by_id(cluster, client):
    ids = np.array([[5, -1], [599, 0]])
    tokens = client.neighbour_tokens(ids)
    np.testing.assert_array_equal(tokens, cluster.world.tokens(ids))
    assert client.documents(ids)[::3] == [("document 1", "title 1"), ("document 0", "title 0")]
    assert client.documents(np.array([-1])) == [("", "")]


def test_it_describes_itself_and_a_client_pinned_to_another_database_refuses(cluster, client, queries):
    description = client.description
    world = cluster.world
    assert (description.database, description.dimension, description.chunks) == ("world1", world.dimension, 600)
    assert (description.num_shards, description.embeds) == (2, False)
    with (
        RetrievalClient(cluster.front.address, database="another") as pinned,
        pytest.raises(RetrievalError, match="serves database world1, not another"),
    ):
        pinned.search(queries, 1)
    call = raw(cluster.front.address)
    request = pb.SearchRequest(vectors=vectors(queries), k=1, database="another")
    with pytest.raises(grpc.RpcError) as refused:
        call(request)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert pb.SearchResponse.FromString(call(pb.SearchRequest(vectors=vectors(queries), k=1))).database == "world1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda request: request.vectors.ClearField("values"), "0 queries"),
        (lambda request: setattr(request, "k", 0), "k is 0"),
        (lambda request: setattr(request.vectors, "dimension", 9), "9 components, this database's 8"),
        (lambda request: setattr(request.vectors, "values", b"123"), "3 bytes"),
        (lambda request: setattr(request.vectors, "embedder", "other"), "another embedder"),
        (
            lambda request: setattr(request.vectors, "values", np.full(16, np.nan, "<f4").tobytes()),
            "query 0 is not fin",
        ),
        (lambda request: setattr(request.vectors, "values", np.full(16, 3e38, "<f4").tobytes()), "too large"),
        (lambda request: request.ClearField("vectors"), "no queries"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(cluster, queries, change, reason):
    request = pb.SearchRequest(vectors=vectors(queries), k=2)
    change(request)
    for server in (cluster.front, cluster.shards[0][0]):
        with pytest.raises(grpc.RpcError, match=reason) as refused:
            raw(server.address)(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_ids_outside_the_database_and_texts_without_an_embedder_are_refused(cluster, client):
    with pytest.raises(RetrievalError, match="the database has 600"):
        client.documents(np.array([600]))
    with pytest.raises(RetrievalError, match="no embedder"):
        client.search_texts(["a text"], 2)
    with pytest.raises(UserError, match="HOST:PORT"):
        RetrievalClient("nowhere")


def test_it_is_alive_but_not_ready_while_it_loads(tmp_path, queries):
    World().write(tmp_path)
    server = standin(tmp_path, "0,1", start_delay=3)
    with running(server):
        assert [health(server.address, name) for name in ("liveness", "readiness", "")] == [
            "SERVING", "NOT_SERVING", "NOT_SERVING"
        ]  # fmt: skip
        with RetrievalClient(server.address) as client:
            with pytest.raises(RetrievalError, match="nothing is loaded yet"):
                client.search(queries, 1)
            with pytest.raises(grpc.RpcError, match="being loaded") as refused:
                raw(server.address)(pb.SearchRequest(vectors=vectors(queries), k=1))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert client.wait_until_ready(30).database == "world1"
        server.event("loaded")
        assert server.end() == 0


def test_a_damaged_database_is_named_and_never_served(tmp_path):
    (tmp_path / "world.json").write_text("damaged")
    server = standin(tmp_path, "0")
    with running(server):
        assert server.process.wait(30) == 1
        server.event("listening")
        assert server.lines[-2:-1] == [
            f"error: {tmp_path}/world.json: checksum differs from the manifest; rebuild it\n"
        ]


def vectors(values: np.ndarray) -> pb.Vectors:
    return pb.Vectors(values=values.astype("<f4").tobytes(), dimension=values.shape[1], embedder="embedder")


def raw(address: str):
    """Search on a channel without the client's retries."""
    channel = grpc.insecure_channel(address)
    call = channel.unary_unary("/retro_jax.retrieval.v1.Retrieval/Search")
    return lambda request: call(request.SerializeToString(), timeout=20)
