"""Bounds are kept before any work is done for a request, and what passes them is told apart from an overload."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from standin import World, WorldHolding

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.admission import Admission, Ticket
from retro_jax.retrieval.service.calls import Calls
from retro_jax.retrieval.service.client import RetrievalClient, RetrievalError
from retro_jax.retrieval.service.local import LocalSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.replicas import Backend
from retro_jax.retrieval.service.security import ServerSecurity
from retro_jax.retrieval.service.wire import Limits

MESSAGE_BYTES = 4000


class Embedding:
    """Embeds every text as a row of ones, and decodes tokens to the same; counts both."""

    vocab_size = 50

    def __init__(self) -> None:
        self.decoded, self.embedded = 0, 0

    def decode(self, row: list[int]) -> str:
        self.decoded += 1
        return "text"

    def vectors(self, texts: list[str], version: pb.Version) -> np.ndarray:
        self.embedded += len(texts)
        return np.ones((len(texts), version.dimension), np.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, embedding, admission) of a server in this process, with one slot and no queue."""
    directory = tmp_path_factory.mktemp("world")
    World(num_shards=1).write(directory)
    embedding = Embedding()
    holding = WorldHolding(directory, [0], {"port": 0})
    holding.tokenizer = embedding
    log, metrics = Log(open("/dev/null", "w")), Metrics()  # noqa: SIM115  as long as the module
    source = LocalSource(lambda: holding, lambda: 1, log=log, metrics=metrics)
    source.load()
    admission = Admission(1, requests=0, queries=1)
    calls = Calls(
        source,
        limits=Limits(queries=6, text_bytes=20),
        admission=admission,
        security=ServerSecurity(),
        log=log,
        metrics=metrics,
        embedding=embedding,
    )
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
    server.add_generic_rpc_handlers((calls.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", embedding, admission
    server.stop(0).wait()


@pytest.fixture
def search(served):
    with grpc.insecure_channel(served[0]) as channel:
        call = channel.unary_unary("/retro_jax.retrieval.v1.Retrieval/Search")

        def search(**request: object) -> pb.SearchResponse:
            data = pb.SearchRequest(k=1, **request).SerializeToString()
            return pb.SearchResponse.FromString(call(data, timeout=20))

        yield search


def chunks(n: int, token: int = 7) -> pb.Tokens:
    return pb.Tokens(values=np.full((n, 4), token, "<i4").tobytes(), chunk_length=4)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"texts": pb.Texts(values=["a"] * 7)}, "7 queries; a request has 1 to 6"),
        ({"texts": pb.Texts(values=[])}, "0 queries; a request has 1 to 6"),
        ({"texts": pb.Texts(values=["a", "ä" * 11])}, "text 1 is longer than 20 bytes"),
        ({"tokens": chunks(7)}, "7 queries; a request has 1 to 6"),
        ({"tokens": chunks(2, 50)}, "a token is outside the vocabulary of 50"),
        ({"tokens": pb.Tokens(values=bytes(12), chunk_length=3)}, "chunks of 3 tokens, this database's have 4"),
        ({"vectors": pb.Vectors(values=bytes(7 * 32), dimension=8)}, "7 queries; a request has 1 to 6"),
    ],
)
def test_what_passes_a_limit_is_refused_before_anything_is_decoded(served, search, request_, reason):
    embedding = served[1]
    before = embedding.decoded, embedding.embedded
    with pytest.raises(grpc.RpcError, match=reason) as refused:
        search(**request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (embedding.decoded, embedding.embedded) == before


def test_nothing_is_decoded_for_a_request_that_the_queue_does_not_take(served, search):
    _, embedding, admission = served
    before = embedding.decoded
    with admission.slot(Ticket(1), 30), pytest.raises(grpc.RpcError, match="the queue is full") as refused:
        search(tokens=chunks(6))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert embedding.decoded == before
    assert len(search(tokens=chunks(6)).ids) == 6 * 8 and embedding.decoded == before + 6


def test_a_message_that_is_too_large_is_not_sent_again(served, monkeypatch):
    sent = []
    finish = Backend.finish
    monkeypatch.setattr(Backend, "finish", lambda *asked: sent.append(asked[1]) or finish(*asked))
    with RetrievalClient(served[0]) as client:
        with pytest.raises(RetrievalError, match=r"message larger than max \(\d+ vs. 4000\); ask for less") as refused:
            client.search_texts(["a" * 2000] * 6, 1)
        assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert len(str(refused.value).splitlines()) == 1
        assert sent == ["Describe", "Search"]
        # An overload passes, and is asked again until the deadline.
        _, _, admission = served
        with contextlib.ExitStack() as busy:
            busy.enter_context(admission.slot(Ticket(1), 30))

            def soon(*asked: object) -> object:
                sent.append(asked[1])
                if len(sent) > 14:
                    busy.close()
                return finish(*asked)

            monkeypatch.setattr(Backend, "finish", soon)
            monkeypatch.setattr("retro_jax.retrieval.service.replicas.random.uniform", lambda low, high: 0.01)
            assert client.search_texts(["a"], 1)[0].shape == (1, 1)
        assert len(sent) == 15
