"""Neighbours found through the service, while a server of it is killed, are byte for byte those found in process."""

import itertools
import json
import re
import signal

import numpy as np
import pytest
from processes_of_service import front, program, running, wait_ready
from small_run import error_line

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.distribute import BeamOptions
from retro_jax.errors import UserError
from retro_jax.retrieval.embedder import EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours
from retro_jax.retrieval.service.access import Service
from retro_jax.retrieval.service.client import RetrievalClient

WORDS = re.findall(r"\S+", "the cat of a house and 3 birds sing in the tree while it rains, he said; nobody came.")
DOCUMENTS = 2400
FILES = 6


@pytest.fixture(scope="module")
def database(tokenizer, tiny_embedder, tmp_path_factory):
    """A database of 2,400 documents in six files, its index in two shards built by two worker processes."""
    root = tmp_path_factory.mktemp("precompute")
    rng = np.random.default_rng(0)
    inputs = [root / f"text-{i}.jsonl" for i in range(FILES)]
    for number, path in enumerate(inputs):
        texts = (" ".join(rng.choice(WORDS, rng.integers(4, 14))) for _ in range(DOCUMENTS // FILES))
        rows = [{"id": f"{number}-{i}", "text": text, "group": f"{i // 3}"} for i, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus(inputs, tokenizer, root / "DB" / "corpus", chunk_length=16)
    embed_corpus(Corpus(root / "DB" / "corpus"), tiny_embedder, root / "DB" / "embeddings")
    options = BeamOptions(workers=2)
    build_index(EmbeddingSet(root / "DB" / "embeddings"), root / "DB" / "index", num_shards=2, options=options)
    return root / "DB"


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_killed_shard_changes_no_byte_of_the_neighbours(database, tmp_path, monkeypatch, deduplicate):
    corpus = Corpus(database / "corpus")
    expected = find_neighbours(corpus, database, tmp_path / "here", k=6, deduplicate=deduplicate)
    shards = [[program(f"--database={database}", f"--shards={shard}/2") for _ in range(2)] for shard in range(2)]
    servers = [server for group in shards for server in group]
    with running(*servers):
        asking = front(*servers)
        with running(asking):
            wait_ready(*servers, asking)
            output = tmp_path / "there"
            search, calls = RetrievalClient.search, itertools.count()

            def search_and_kill(client, vectors, k, exclude_keys=None):
                if next(calls) == 2:
                    shards[1][0].kill()
                return search(client, vectors, k, exclude_keys)

            monkeypatch.setattr(RetrievalClient, "search", search_and_kill)
            found = find_neighbours(
                corpus,
                None,
                output,
                k=6,
                deduplicate=deduplicate,
                embeddings=EmbeddingSet(database / "embeddings"),
                service=Service(asking.address),
            )
            assert next(calls) >= FILES and shards[1][0].process.returncode == -signal.SIGKILL
    assert found == expected
    for shard in expected.shards:
        assert (tmp_path / "here" / shard.name).read_bytes() == (tmp_path / "there" / shard.name).read_bytes()
    table = NeighbourTable(output, verify=True)
    ids = table.ids(np.arange(corpus.num_chunks))
    assert (ids[:, 0] >= 0).mean() > 0.9
    if deduplicate:
        tokens = [set(map(bytes, corpus.tokens(row[row >= 0]))) for row in ids[:200]]
        assert [len(each) for each in tokens] == (ids[:200] >= 0).sum(1).tolist()
        assert found.counts["duplicates"] > 0


def test_a_service_that_does_not_answer_is_one_line(database, tmp_path):
    flags = [f"--corpus={database}/corpus", f"--output={tmp_path}/n", "--service=127.0.0.1:1"]
    line = error_line("tools/find_neighbours.py", *flags, f"--embeddings={database}/embeddings")
    assert "127.0.0.1:1" in line and not (tmp_path / "n").exists()
    assert "give --database, or --service with --embeddings" in error_line("tools/find_neighbours.py", *flags)
    with pytest.raises(UserError, match="a service is HOST:PORT"):
        embeddings = EmbeddingSet(database / "embeddings")
        find_neighbours(
            Corpus(database / "corpus"), None, tmp_path / "n", embeddings=embeddings, service=Service("nowhere")
        )
