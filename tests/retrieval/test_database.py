"""A database answers with the right chunks and continuations, never an excluded document, and only to its embedder."""

import re

import numpy as np
import pytest
import tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.excluding import search_excluding
from retro_jax.retrieval.index_build import build_index


class ExactIndex:
    """Stands for an index: exact, and it remembers how many neighbours it was asked for."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.size, self.asked = vectors, len(vectors), []

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(k)
        return exact_search(queries, self.vectors, k)


@given(st.integers(0, 10**9), st.integers(1, 60), st.integers(1, 6), st.integers(1, 9), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_exclusion_equals_filtering_all_neighbours(seed, size, k, documents, excluded):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(size, 3)).astype(np.float32)
    keys = rng.integers(0, documents, size)
    queries = rng.normal(size=(4, 3)).astype(np.float32)
    queries[2] = 0  # a chunk without word pieces
    exclude = rng.integers(-1, documents, (4, excluded))
    key_of = lambda ids: np.where(ids >= 0, keys[np.maximum(ids, 0)], -1)  # noqa: E731
    ids, distances, dropped = search_excluding(ExactIndex(vectors).search, size, key_of, queries, k, exclude)
    everything, squares = exact_search(queries, vectors, size)
    expected_dropped = 0
    for i in range(4):
        allowed = [] if i == 2 else [j for j in range(size) if keys[everything[i, j]] not in exclude[i]][:k]
        np.testing.assert_array_equal(ids[i, : len(allowed)], everything[i, allowed])
        np.testing.assert_allclose(distances[i, : len(allowed)], squares[i, allowed], rtol=1e-6)
        assert (ids[i, len(allowed) :] == -1).all() and np.isinf(distances[i, len(allowed) :]).all()
        if i != 2:
            reach = allowed[-1] if len(allowed) == k else size
            expected_dropped += sum(keys[everything[i, j]] in exclude[i] for j in range(reach))
    assert dropped == expected_dropped


def test_fetching_grows_only_for_rows_that_need_it():
    vectors = np.arange(1, 1001, dtype=np.float32)[:, None]
    keys = (np.arange(1000) >= 500).astype(np.int64)
    index = ExactIndex(vectors)
    key_of = lambda ids: np.where(ids >= 0, keys[np.maximum(ids, 0)], -1)  # noqa: E731
    ids, _, dropped = search_excluding(index.search, 1000, key_of, np.array([[1.0], [1.0]]), 2, np.array([0, 1]))
    assert ids.tolist() == [[500, 501], [0, 1]] and dropped == 500
    assert index.asked == [12, 24, 48, 96, 192, 384, 768]


@pytest.fixture(scope="module")
def database(make_corpus, tiny_embedder, tmp_path_factory):
    """(directory, corpus) of a database of 4 documents in 2 shards; the first and the last are one group."""
    directory = tmp_path_factory.mktemp("database")
    words = re.findall(r"\S+", "the cat of a house and 3 birds sing in the tree while it rains, he said; nobody came.")
    texts = [" ".join(np.random.default_rng(i).choice(words, 60)) for i in range(4)]
    records = [{"id": str(i), "text": text, "group": str(i % 3)} for i, text in enumerate(texts)]
    corpus = make_corpus([records[:2], records[2:]], directory / "corpus")
    embed_corpus(corpus, tiny_embedder, directory / "embeddings")
    build_index(EmbeddingSet(directory / "embeddings"), directory / "index")
    return directory, corpus


def test_chunks_of_the_database_find_themselves_with_their_continuation(database, tiny_embedder):
    directory, corpus = database
    opened = Database.open(directory, tiny_embedder)
    every = np.arange(corpus.num_chunks)
    found = opened.retrieve(corpus.tokens(every), 3)
    assert found.ids.shape == found.distances.shape == (len(every), 3)
    assert found.tokens.shape == (len(every), 3, 32) and found.tokens.dtype == np.int32
    # A last chunk of nothing but [EOS] has no text, so no vector and no neighbours.
    worded = np.array([bool(corpus.text(chunk)) for chunk in every])
    assert 0 < (~worded).sum() < 3
    assert (found.ids[~worded] == -1).all() and np.isinf(found.distances[~worded]).all()
    assert (found.distances[worded, 0] < 1e-6).all()
    np.testing.assert_array_equal(found.tokens[:, 0, :16], corpus.tokens(found.ids[:, 0]))
    np.testing.assert_array_equal(corpus.tokens(found.ids[worded, 0]), corpus.tokens(every[worded]))
    for row, ids in zip(found.tokens.reshape(-1, 32), found.ids.reshape(-1), strict=True):
        after = ids + 1
        same = ids >= 0 and after < corpus.num_chunks and corpus.document_index(after) == corpus.document_index(ids)
        expected = corpus.tokens(after) if same else np.zeros(16)
        np.testing.assert_array_equal(row[16:], expected)  # never into the next document


def test_excluded_documents_are_not_retrieved(database, tiny_embedder):
    directory, corpus = database
    opened = Database.open(directory, tiny_embedder)
    every = np.arange(corpus.num_chunks)
    keys = corpus.document_keys(every)
    found = opened.retrieve(corpus.tokens(every), corpus.num_chunks, exclude_keys=keys)
    real = found.ids >= 0
    assert (corpus.document_keys(found.ids) != keys[:, None])[real].all()
    worded = np.array([bool(corpus.text(chunk)) for chunk in every])
    assert (real.sum(1) == [(worded & (keys != key)).sum() * has for key, has in zip(keys, worded, strict=True)]).all()
    assert (found.tokens[~real] == 0).all()


def test_another_embedder_is_refused(database, tmp_path):
    directory, _ = database
    for changed in ({"normalize": True}, {"normalize": False, "max_length": 95}):
        other = Embedder.load(tiny_bert.write_tiny_bert(tmp_path / "same"), **({"max_length": 96} | changed))
        with pytest.raises(UserError, match=r"the given embedder is .*, the database was embedded with"):
            Database.open(directory, other)
    other = Embedder.load(tiny_bert.write_tiny_bert(tmp_path / "other", seed=5), normalize=False, max_length=96)
    with pytest.raises(UserError, match="the database was embedded with"):
        Database.open(directory, other)


def test_live_queries_need_an_embedder(database):
    with pytest.raises(UserError, match="open the database with the one it was made with"):
        Database.open(database[0]).retrieve(np.ones((1, 16), np.int32), 2)


def test_parts_that_do_not_belong_together_are_refused(database, make_corpus, tmp_path):
    (tmp_path / "index").symlink_to(database[0] / "index")
    make_corpus(
        [[{"text": "another corpus altogether, of the same kind but not the same text at all"}]], tmp_path / "corpus"
    )
    with pytest.raises(UserError, match="the index was made from corpus"):
        Database.open(tmp_path)


def test_absent_and_unfinished_databases_are_named(tmp_path):
    with pytest.raises(UserError, match="expected a database with corpus/ and index/"):
        Database.open(tmp_path / "absent")
    with pytest.raises(UserError, match="corpus: no such directory"):
        Database.open(tmp_path)


def test_the_fingerprint_names_this_database(database):
    directory, corpus = database
    opened = Database.open(directory)
    assert len(opened.fingerprint) == 16 and opened.fingerprint not in (
        corpus.fingerprint,
        opened.indexes[0].fingerprint,
    )
    assert Database.open(directory, verify=False).fingerprint == opened.fingerprint
