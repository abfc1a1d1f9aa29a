"""Ten thousand requests of any kind leave the server unharmed, and each gets an answer or a reason."""

import socket
from collections import Counter

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes_of_service import running, standin, wait_ready
from standin import VOCABULARY, World, decode, embed

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.client import RetrievalClient

WORLD = World(chunks=60, num_shards=1)
AT_ONCE, EXAMPLES = 50, 200
REASONED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,  # another database
}
counts = Counter()  # of all requests, of answered ones (and of these by what was searched with), and of refused ones


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    WORLD.write(directory)
    started = standin(directory, "0", queue_requests=100, queue_queries=1_000_000, embeds=1)
    with running(started):
        wait_ready(started)
        yield started


@pytest.fixture(scope="module")
def calls(server):
    with grpc.insecure_channel(server.address) as channel:
        yield {
            name: channel.unary_unary(f"/retro_jax.retrieval.v1.Retrieval/{name}")
            for name in ("Search", "Fetch", "Describe")
        }


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, np.nan, np.inf, -np.inf, 3e38, 1e-40]),
    st.floats(-10, 10, width=32),
)


def normal(n, seed):
    return np.random.default_rng(seed).normal(size=8 * n).astype("<f4").tobytes()


rows = st.one_of(
    st.builds(normal, st.integers(0, 9), st.integers(0, 9)),
    st.builds(normal, st.integers(1, 9), st.integers(0, 9)),
    st.builds(normal, st.integers(1, 9), st.integers(0, 9)),
    st.lists(values, min_size=8, max_size=8).map(lambda row: np.array(row, "<f4").tobytes()),
    st.binary(max_size=40),
)
names = st.sampled_from(["", "embedder", "tokenizer", "world1", "other", "\U0001f600"])
embedders = st.sampled_from(["", "", "embedder", "embedder"]) | names
int64 = st.integers(-(2**63), 2**63 - 1)
some_ids = st.lists(st.one_of(st.integers(-2, 61), int64), max_size=6).map(lambda ids: np.array(ids, "<i8").tobytes())


def searches_by(**queries):
    return st.builds(
        pb.SearchRequest,
        k=st.one_of(st.integers(1, 9), st.integers(0, 70), st.sampled_from([1000, 1001, 2**31, 2**32 - 1])),
        exclude_keys=st.one_of(st.just(b""), st.just(b""), some_ids, st.binary(max_size=20)),
        database=st.sampled_from(["", "", "", "world1", "other"]),
        allow_partial=st.booleans(),
        with_tokens=st.booleans(),
        **queries,
    )


def chunks_of(token):
    """Bytes of a few chunks; nearly always of whole ones."""
    return st.lists(st.tuples(*4 * [token]), max_size=6).map(lambda rows: np.array(rows, "<i4").tobytes())


searches = searches_by(
    vectors=st.none()
    | st.builds(pb.Vectors, values=rows, dimension=st.sampled_from([8] * 6 + [0, 7, 2**32 - 1]), embedder=embedders)
)
tokens = st.one_of(
    chunks_of(st.integers(0, VOCABULARY - 1)),
    chunks_of(st.integers(0, VOCABULARY - 1)),
    chunks_of(st.integers(-1, VOCABULARY)),
    chunks_of(st.integers(-(2**31), 2**31 - 1)),
    st.binary(max_size=40),
)
tokenizers = st.sampled_from(["", "", "tokenizer", "other"])
lengths = st.sampled_from([4] * 6 + [0, 3, 2**32 - 1])
text = st.one_of(names, st.text(max_size=20), st.sampled_from(["\0", "ä" * 32_768, "ä" * 32_769]))
others = searches_by(
    tokens=st.builds(pb.Tokens, values=tokens, chunk_length=lengths, tokenizer=tokenizers)
) | searches_by(texts=st.builds(pb.Texts, values=st.lists(text, max_size=3)))
fetches = st.builds(pb.FetchRequest, ids=some_ids, database=names, with_documents=st.booleans())
describes = st.builds(pb.DescribeRequest, using=names, with_tokenizer=st.booleans())


def cut(message, where):
    data = message.SerializeToString()
    return data[: where % (len(data) + 1)]


requests = st.one_of(
    st.tuples(st.just("Search"), searches.map(lambda message: message.SerializeToString())),
    st.tuples(st.just("Search"), searches.map(lambda message: message.SerializeToString())),
    st.tuples(st.just("Search"), st.builds(cut, searches, st.integers(0, 200))),
    st.tuples(st.just("Search"), others.map(lambda message: message.SerializeToString())),
    st.tuples(st.just("Search"), others.map(lambda message: message.SerializeToString())),
    st.tuples(st.just("Search"), st.builds(cut, others, st.integers(0, 200))),
    st.tuples(st.just("Fetch"), fetches.map(lambda message: message.SerializeToString())),
    st.tuples(st.just("Describe"), describes.map(lambda message: message.SerializeToString())),
    st.tuples(st.sampled_from(["Search", "Fetch", "Describe"]), st.binary(max_size=60)),
)


@given(st.lists(requests, min_size=AT_ONCE, max_size=AT_ONCE))
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
def check(calls, batch):
    pending = [(name, data, calls[name].future(data, timeout=30)) for name, data in batch]
    for name, data, call in pending:
        counts["requests"] += 1
        if call.exception() is None:
            counts["answered"] += 1
            if name == "Search":
                check_answer(pb.SearchRequest.FromString(data), pb.SearchResponse.FromString(call.result()))
        else:
            counts["refused"] += 1
            assert call.code() in REASONED and call.details(), (call.code(), call.details(), data)


def check_answer(request, response):
    kind = request.WhichOneof("queries")
    counts[kind] += 1
    if kind == "vectors":
        queries = np.frombuffer(request.vectors.values, "<f4").reshape(-1, 8)
    elif kind == "tokens":
        chunks = np.frombuffer(request.tokens.values, "<i4").reshape(-1, 4)
        queries = embed([decode(row) for row in chunks.tolist()], 8)
    else:
        queries = embed(request.texts.values, 8)
    keys = np.frombuffer(request.exclude_keys, "<i8").reshape(len(queries), -1) if request.exclude_keys else None
    ids, distances = WORLD.search(queries, request.k, keys)
    assert response.ids == ids.tobytes() and response.distances == distances.tobytes()
    assert len(response.tokens) == (ids.size * 8 * 4 if request.with_tokens else 0)


def test_ten_thousand_requests_leave_the_server_unharmed(server, calls):
    check(calls)
    assert counts["requests"] >= 10_000
    assert counts["answered"] > 500 and counts["refused"] > 2_000
    assert min(counts[kind] for kind in ("vectors", "tokens", "texts")) > 20
    with RetrievalClient(server.address) as client:
        queries = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
        np.testing.assert_array_equal(client.search(queries, 4)[0], WORLD.search(queries, 4)[0])
    assert server.process.poll() is None


@given(st.binary(min_size=1, max_size=200), st.booleans())
@settings(deadline=None, max_examples=50, database=None)
def garbage(port, data, preface):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if preface else b"") + data)


def test_bytes_that_are_no_http_are_dropped(server, calls):
    garbage(server.port)
    assert pb.DescribeResponse.FromString(calls["Describe"](b"", timeout=10)).versions


def test_a_message_beyond_the_limit_is_refused(server, calls):
    with pytest.raises(grpc.RpcError) as refused:
        calls["Search"](bytes((64 << 20) + 1), timeout=30)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert pb.DescribeResponse.FromString(calls["Describe"](b"", timeout=10)).versions
