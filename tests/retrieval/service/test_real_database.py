"""launch/serve_retrieval.py over a real database in shards: equal to the library, updated while it serves."""

import io
import json
import re
import shutil
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import tiny_bert
from processes_of_service import front, health, program, running, wait_ready
from small_run import error_line, run_program

from retro_jax.errors import UserError
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index import Index
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.segments import signature
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.client import RetrievalClient, RetrievalError
from retro_jax.retrieval.service.holding import ChosenShards, open_database
from retro_jax.retrieval.service.local import LocalSource
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.replicas import Patience
from retro_jax.retrieval.service.self_check import recall
from retro_jax.retrieval.update import remove_documents

WORDS = [
    "the",
    "cat",
    "of",
    "a",
    "house",
    "and",
    "3",
    "birds",
    "sing",
    "in",
    "tree",
    "while",
    "it",
    "rains",
    "he",
    "said",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return tiny_bert.write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def database(make_corpus, bert, tmp_path_factory) -> Path:
    """40 documents in 2 groups of 20, an index of 2 shards."""
    directory = tmp_path_factory.mktemp("database") / "database"
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 60)) for i in range(40)]
    records = [{"id": f"doc-{i}", "text": text, "title": f"Title {i}"} for i, text in enumerate(texts)]
    corpus = make_corpus([records[:20], records[20:]], directory / "corpus")
    embedder = Embedder.load(bert, normalize=True, max_length=64, lengths=(64,), rows_per_device=8)
    embed_corpus(corpus, embedder, directory / "embeddings")
    build_index(EmbeddingSet(directory / "embeddings"), directory / "index", num_shards=2, recall_queries=32)
    return directory


@pytest.fixture(scope="module")
def served(database, bert):
    """(front, shard servers), each shard server with every second shard, the front with the embedder."""
    flags = (f"--database={database}", "--reload_seconds=0.5")
    shards = [program(*flags, f"--shards={part}/2") for part in range(2)]
    with running(*shards):
        asking = front(*shards, flags=(f"--embedder={bert}",))
        with running(asking):
            wait_ready(*shards, asking, timeout=120)
            yield asking, shards


def test_answers_equal_the_library_bit_by_bit(database, served):
    opened = Database.open(database)
    corpus = opened.corpus
    vectors = EmbeddingSet(database / "embeddings").vectors(np.arange(corpus.num_chunks))
    keys = corpus.document_keys(np.arange(corpus.num_chunks))
    with RetrievalClient(served[0].address) as client:
        assert client.fingerprint == opened.fingerprint
        for exclude in (None, keys):
            ids, distances = client.search(vectors, 4, exclude)
            expected = opened.search(vectors, 4, exclude)
            assert ids.tobytes() == expected[0].tobytes() and distances.tobytes() == expected[1].tobytes()
        np.testing.assert_array_equal(client.neighbour_tokens(ids), opened.neighbour_tokens(ids))
        document = corpus.document(int(corpus.document_index(ids[5, 0])))
        assert client.documents(ids[5, :1]) == [(document.id, document.metadata["title"])]


def test_the_front_embeds_tokens_and_texts(database, served, bert):
    embedder = Embedder.load(bert, normalize=True, max_length=64)
    opened = Database.open(database, embedder)
    chunks = opened.corpus.tokens(np.arange(7))
    with RetrievalClient(served[0].address) as client:
        assert client.description.embeds
        found, expected = client.retrieve(chunks, 3), opened.retrieve(chunks, 3)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.distances, expected.distances)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert (found.ids[:, 0] == np.arange(7)).all()
        ids, _ = client.search_texts(opened.texts(np.arange(7)), 1)
        assert ids[:, 0].tolist() == list(range(7))
        with pytest.raises(RetrievalError, match="chunks of 15 tokens, this database's have 16"):
            client.retrieve(chunks[:, :15], 1)
        with pytest.raises(RetrievalError, match="outside the vocabulary of 800"):
            client.retrieve(chunks + 800, 1)
    tokens = pb.Tokens(values=chunks.tobytes(), chunk_length=16, tokenizer="another")
    with grpc.insecure_channel(served[0].address) as channel:
        call = channel.unary_unary("/retro_jax.retrieval.v1.Retrieval/Search")
        with pytest.raises(grpc.RpcError, match="tokens of another tokenizer than the database's") as refused:
            call(pb.SearchRequest(tokens=tokens, k=1).SerializeToString(), timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_shard_server_needs_neither_tensorflow_nor_jax(served):
    for server in served[1]:
        libraries = {Path(file.path).name for file in psutil.Process(server.process.pid).memory_maps()}
        assert any("scann" in name for name in libraries)
        assert not [name for name in libraries if re.search("tensorflow|jaxlib|xla", name)]


def test_a_removed_document_is_found_no_more_and_nobody_notices_the_change(database, served, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    server = program(f"--database={copy}", "--reload_seconds=0.1")
    with running(server):
        wait_ready(server)
        opened = Database.open(copy)
        key = opened.corpus.document_keys(np.arange(1))[0]
        vectors = EmbeddingSet(copy / "embeddings").vectors(np.arange(8))
        with RetrievalClient(server.address) as client:
            assert client.search(vectors, 1)[0][0, 0] == 0
        remove_documents(copy, ids=["doc-0"])
        now = Database.open(copy)
        while True:
            with RetrievalClient(server.address) as client:
                ids = client.search(vectors, 5)[0]
                if client.fingerprint == now.fingerprint:
                    break
            assert client.fingerprint == opened.fingerprint
        with RetrievalClient(server.address) as client:
            for fetch in (client.neighbour_tokens, client.documents):
                with pytest.raises(RetrievalError, match="chunk 0 is of a document that was removed") as refused:
                    fetch(np.array([opened.corpus.num_chunks - 1, 0]))
                assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
            assert client.neighbour_tokens(ids).shape == (8, 5, 32)
        np.testing.assert_array_equal(ids, now.search(vectors, 5)[0])
        assert key not in now.corpus.document_keys(ids)


def test_a_dead_shard_fails_only_the_queries_that_visit_it(database, tmp_path):
    copy = tmp_path / "by-cluster"
    shutil.copytree(database, copy, ignore=shutil.ignore_patterns("index"))
    embeddings = EmbeddingSet(copy / "embeddings")
    build_index(embeddings, copy / "index", num_shards=2, cells=8, cells_to_visit=1, min_recall=0, recall_queries=32)
    opened = Database.open(copy)
    numbers = np.arange(opened.corpus.num_chunks)
    vectors, keys = embeddings.vectors(numbers), opened.corpus.document_keys(numbers)
    visits = opened.indexes[0].router.visits(vectors, 2 * 2 + 8)
    alone = [np.flatnonzero(visits[:, shard] & ~visits[:, 1 - shard]) for shard in range(2)]
    assert min(map(len, alone)) > 5
    shards = [program(f"--database={copy}", f"--shards={shard}") for shard in range(2)]
    with running(*shards):
        asking = front(*shards)
        with (
            running(asking),
            RetrievalClient(asking.address, patience=Patience(attempts=1), allow_partial=True) as partial,
            RetrievalClient(asking.address, patience=Patience(attempts=1)) as client,
        ):
            wait_ready(*shards, asking)
            for exclude in (None, keys):
                ids, distances = client.search(vectors, 2, exclude)
                expected = opened.search(vectors, 2, exclude)
                assert ids.tobytes() == expected[0].tobytes() and distances.tobytes() == expected[1].tobytes()
            shards[1].kill()
            np.testing.assert_array_equal(
                client.search(vectors[alone[0]], 2)[0], opened.search(vectors[alone[0]], 2)[0]
            )
            with pytest.raises(RetrievalError, match="shard 1 of 2: "):
                client.search(vectors, 2)
            assert partial.search_found(vectors[alone[0]], 2).missing_shards == ()
            found = partial.search_found(vectors, 2)
            assert found.missing_shards == (1,) and (found.ids[alone[1]] == -1).all()
            np.testing.assert_array_equal(found.ids[alone[0]], opened.search(vectors[alone[0]], 2)[0])


def test_recall_is_measured_at_load(served):
    for server in served[1]:
        assert server.event("loaded")["recall"] == 1.0


def test_an_index_that_finds_too_little_is_measured_so_and_not_served(database, tmp_path):
    copy = tmp_path / "poor"
    shutil.copytree(database, copy, ignore=shutil.ignore_patterns("index"))
    poor = IndexSettings(kind="tree", num_leaves=4, leaves_to_search=1, reorder=200)
    counts = build_index(EmbeddingSet(copy / "embeddings"), copy / "index", poor, num_shards=2, min_recall=0).counts
    measured = recall([Index.load(copy / "index")])
    assert 0 < measured < 0.95 and measured == pytest.approx(counts["recall_at_2"], abs=1e-3)
    for floor in (measured - 0.01, measured + 0.01):
        source = LocalSource(
            lambda: open_database(copy, ChosenShards()),
            lambda: signature(copy),
            log=Log(io.StringIO()),
            metrics=Metrics(),
            min_recall=floor,
        )
        if floor < measured:
            source.load()
            assert source.version("").recall == pytest.approx(measured)
        else:
            with pytest.raises(UserError, match=rf"recall at k = 2 is {measured:.3f} .* is wanted \(--min_recall\)"):
                source.load()
            assert not source.versions()


@pytest.mark.parametrize("part", ["index/shard-00001-of-00002/ids.npy", "index/probes.npy"])
def test_a_flipped_bit_is_named_and_never_served(database, tmp_path, part):
    copy = tmp_path / "copy"
    shutil.copytree(database, copy)
    data = bytearray((copy / part).read_bytes())
    data[-3] ^= 16
    (copy / part).write_bytes(data)
    line = error_line("launch/serve_retrieval.py", "--port=0", f"--database={copy}")
    assert part in line and "checksum differs" in line


def test_mistakes_are_named_in_one_line(database, served, tmp_path):
    def mistake(*flags: str) -> str:
        return error_line("launch/serve_retrieval.py", *flags)

    assert "give --database for a shard server, or --backends for a front" in mistake()
    assert "no such directory" in mistake(f"--database={tmp_path / 'nowhere'}", "--port=0")
    assert "index shards 0 to 1, not 7" in mistake(f"--database={database}", "--shards=7", "--port=0")
    short = mistake(f"--database={database}", "--keep_seconds=10", "--max_seconds=30")
    assert "--keep_seconds=10 is less than --max_seconds=30" in short
    assert "not '2/2'" in mistake(f"--database={database}", "--shards=2/2", "--port=0")
    port = served[0].port
    assert f"127.0.0.1:{port}: port in use" in mistake(f"--database={database}", f"--port={port}")
    assert health(served[0].address) == "SERVING"


def test_the_overhead_of_the_service_is_measured(database):
    status, stdout, stderr = run_program("tools/benchmark.py", "service", f"--database={database}", "--steps=3")
    assert status == 0, stderr
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [(line["batch"], line["way"]) for line in lines] == [
        (batch, way) for batch in (1, 64) for way in ("library", "server", "front")
    ]
    for line in lines:
        (library,) = (each for each in lines if each["way"] == "library" and each["batch"] == line["batch"])
        assert line["overhead_ms"] == pytest.approx(line["milliseconds"] - library["milliseconds"], abs=0.002)
        assert line["milliseconds"] > 0
