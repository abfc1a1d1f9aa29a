"""The benchmark of the service: every way answers the same queries, and its cost is over that of the library."""

import json
import shutil

import pytest
from small_run import run_program
from tiny_bert import write_tiny_bert

from retro_jax.data.corpus import Corpus
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index


@pytest.mark.parametrize(("shards", "ways"), [(1, ["library", "server"]), (2, ["library", "server", "front"])])
def test_every_way_is_timed_at_every_batch(small_data, tmp_path, shards, ways):
    database = tmp_path / "database"
    shutil.copytree(small_data.database / "corpus", database / "corpus")
    embedder = Embedder.load(write_tiny_bert(tmp_path / "bert"), normalize=False, max_length=32)
    embed_corpus(Corpus(database / "corpus"), embedder, database / "embeddings")
    build_index(EmbeddingSet(database / "embeddings"), database / "index", num_shards=shards)
    status, stdout, stderr = run_program("tools/benchmark.py", "service", f"--database={database}", "--steps=3")
    assert status == 0, stderr
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [(line["batch"], line["way"]) for line in lines] == [(batch, way) for batch in (1, 64) for way in ways]
    size = Database.open(database).size
    library = {line["batch"]: line["milliseconds"] for line in lines if line["way"] == "library"}
    for line in lines:
        over = line["milliseconds"] - library[line["batch"]]
        assert line["overhead_ms"] == pytest.approx(over, abs=0.002)
        assert line["overhead_percent"] == pytest.approx(100 * over / library[line["batch"]], rel=0.02, abs=0.5)
        assert line["vectors"] == size
