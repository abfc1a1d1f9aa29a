"""A database that is followed answers from one version until it is told to look, and never from a removed document."""

import json

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval.embedder import EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.live import LiveDatabase
from retro_jax.retrieval.segments import SEGMENTS
from retro_jax.retrieval.update import add_documents, remove_documents


def record(seed: int) -> dict:
    words = np.random.default_rng(seed).choice(["cat", "house", "bird", "tree", "rain", "sing", "3", "while"], 60)
    return {"id": f"d{seed}", "text": " ".join(words)}


@pytest.fixture
def make_database(make_corpus, tiny_embedder, tmp_path):
    def make(name, seeds):
        corpus = make_corpus([[record(seed) for seed in seeds]], tmp_path / name / "corpus")
        embed_corpus(corpus, tiny_embedder, tmp_path / name / "embeddings")
        build_index(EmbeddingSet(tmp_path / name / "embeddings"), tmp_path / name / "index")
        return tmp_path / name

    return make


def found(database, chunks) -> set[str]:
    ids = database.retrieve(chunks, 3).ids
    return {document for document, _ in database.documents(ids[ids >= 0])}


def test_changes_are_seen_after_a_refresh_and_not_before(make_database, tiny_embedder, tmp_path):
    directory = make_database("DB", range(3))
    live = LiveDatabase(directory, tiny_embedder)
    assert not live.refresh()
    (tmp_path / "new.jsonl").write_text(json.dumps(record(7)) + "\n")
    corpus = add_documents(directory, [tmp_path / "new.jsonl"], tiny_embedder)
    chunks = corpus.tokens(np.arange(corpus.num_chunks))
    assert found(live, chunks) <= {"d0", "d1", "d2"}
    assert live.refresh() and not live.refresh()
    assert found(live, chunks) == {"d0", "d1", "d2", "d7"}
    remove_documents(directory, ids=["d1", "d7"])
    assert "d7" in found(live, chunks)
    assert live.refresh()
    assert found(live, chunks) == {"d0", "d2"}


def test_a_link_may_be_switched_to_another_database(make_database, tiny_embedder, tmp_path):
    first, second = make_database("first", range(2)), make_database("second", range(5, 8))
    link = tmp_path / "DB"
    link.symlink_to(first)
    live = LiveDatabase(link, tiny_embedder)
    chunks = live.current.corpus.tokens(np.arange(live.current.corpus.num_chunks))
    assert found(live, chunks) == {"d0", "d1"}
    link.unlink()
    link.symlink_to(second)
    assert live.refresh()
    assert found(live, chunks) <= {"d5", "d6", "d7"}


def test_a_damaged_change_is_told_and_the_version_before_answers_no_more(make_database, tiny_embedder):
    directory = make_database("DB", range(3))
    live = LiveDatabase(directory, tiny_embedder)
    chunks = live.current.corpus.tokens(np.arange(2))
    remove_documents(directory, ids=["d0"])
    whole = (directory / SEGMENTS).read_text()
    (directory / SEGMENTS).write_text(whole[:20])
    with pytest.raises(UserError, match="restore it"):
        live.refresh()
    with pytest.raises(UserError, match="restore it"):
        live.retrieve(chunks, 2)
    (directory / SEGMENTS).write_text(whole)
    assert live.refresh() and "d0" not in found(live, chunks)
