"""Bounds are kept before any work is done for a request, and what passes them is told apart from an overload."""

import contextlib
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from standin import World, WorldHolding

from retro_jax.retrieval.service import calls as calls_module
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
    """Embeds every text as a row of ones, and decodes tokens to the same; counts both.

    `meanwhile` is called at every embedding.
    """

    vocab_size = 50

    def __init__(self) -> None:
        self.decoded, self.embedded = 0, 0
        self.meanwhile = lambda: None

    def decode(self, row: list[int]) -> str:
        self.decoded += 1
        return "text"

    def vectors(self, texts: list[str], version: pb.Version) -> np.ndarray:
        self.embedded += len(texts)
        self.meanwhile()
        return np.ones((len(texts), version.dimension), np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Calls with one slot and no queue, and what they are made of."""
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
    return types.SimpleNamespace(
        calls=calls, embedding=embedding, admission=admission, holding=holding, metrics=metrics
    )


@pytest.fixture(scope="module")
def served(made):
    """(address, embedding, admission) of a server in this process that answers with them."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
    server.add_generic_rpc_handlers((made.calls.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", made.embedding, made.admission
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


class Caller:
    """The context of a call whose caller waits for ten seconds, or until he is `gone`."""

    code, reason = grpc.StatusCode.OK, ""

    def time_remaining(self) -> float:
        return 10.0

    def add_callback(self, gone: Callable[[], None]) -> bool:
        self.gone = gone
        return True

    def invocation_metadata(self) -> tuple:
        return ()

    def peer(self) -> str:
        return "caller"

    def abort(self, code: grpc.StatusCode, reason: str) -> None:
        self.code, self.reason = code, reason
        raise grpc.RpcError


@pytest.mark.parametrize("why", ["over", "gone"])
@pytest.mark.parametrize(("n", "embedded"), [(5, 2), (2, 2)])  # in the midst of embedding, and before the search
def test_nothing_more_is_done_for_who_waits_no_longer(made, monkeypatch, why, n, embedded):
    caller, now, searches = Caller(), [0.0], []
    monkeypatch.setattr(calls_module, "_BLOCK", 2)
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(calls_module, "time", clock)
    monkeypatch.setattr(made.holding, "search", searches.append)
    monkeypatch.setattr(
        made.embedding, "meanwhile", lambda: caller.gone() if why == "gone" else now.append(now.pop() + 10)
    )
    before, late = made.embedding.embedded, made.metrics.late._value.get()
    method = types.SimpleNamespace(method="/retro_jax.retrieval.v1.Retrieval/Search", invocation_metadata=())
    answer = made.calls.handler().service(method).unary_unary
    with pytest.raises(grpc.RpcError):
        answer(pb.SearchRequest(k=1, texts=pb.Texts(values=["text"] * n)).SerializeToString(), caller)
    assert (caller.code, caller.reason) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "no time left before the search began",
    )
    assert made.embedding.embedded - before == embedded and not searches
    assert made.metrics.late._value.get() == late + 1 and made.admission.running == 0


def test_texts_of_several_blocks_are_embedded_in_order(made, search, monkeypatch):
    monkeypatch.setattr(calls_module, "_BLOCK", 4)
    lengths = lambda texts, _: np.array([[len(text)] * 8 for text in texts], np.float32)  # noqa: E731
    monkeypatch.setattr(made.embedding, "vectors", lengths)
    texts = ["t" * n for n in (1, 9, 4, 2, 7, 3)]
    ids, _ = World(num_shards=1).search(lengths(texts, None), 1)
    assert search(texts=pb.Texts(values=texts)).ids == ids.tobytes()
