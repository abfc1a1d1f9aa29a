"""BM25 is its formula, whatever is asked together; its neighbours and its order are read as any other."""

import math
import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval import bm25 as bm25_module
from retro_jax.retrieval.bm25 import Bm25, Bm25Settings
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours
from retro_jax.retrieval.reranking import rerank_neighbours
from retro_jax.retrieval.segments import DatabaseCorpus

VOCAB, M = 12, 6
WORDS = re.findall(r"\w+", "the cat of a house and three birds sing in the tree while it rains he said nobody came")


def standin(tokens, keys=None, removed=()):
    """A corpus of chunks [n, M] as `Bm25` reads it."""
    tokens = np.asarray(tokens, np.int32)
    return types.SimpleNamespace(
        num_chunks=len(tokens),
        tokenizer=types.SimpleNamespace(vocab_size=VOCAB, is_text=lambda tokens: tokens > 2),
        pad_id=0,
        fingerprint="standin",
        segments=types.SimpleNamespace(removed_sha256=None),
        removed=lambda ids: np.isin(ids, list(removed)),
        tokens=lambda ids: tokens[ids],
        document_keys=lambda ids: np.zeros(len(ids), np.int64) if keys is None else np.asarray(keys)[ids],
    )


def by_formula(chunks, query, settings, removed=()):
    """Score of every chunk for one query, from the equation, in Python numbers."""
    texts = [[t for t in row if t > 2] if i not in removed else [] for i, row in enumerate(chunks)]
    count = sum(bool(text) for text in texts)
    average = sum(map(len, texts)) / max(count, 1)
    scores = []
    for text in texts:
        score = 0.0
        for term in query:
            tf = text.count(term)
            if term <= 2 or not tf:
                continue
            df = sum(term in other for other in texts)
            idf = math.log(1 + (count - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + settings.k1 * (1 - settings.b + settings.b * len(text) / average))
        scores.append(score)
    return np.array(scores)


chunk = st.lists(st.integers(0, VOCAB - 1), min_size=M, max_size=M)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(chunk, min_size=1, max_size=8),
    st.lists(chunk, min_size=1, max_size=4),
    st.integers(1, 10),
    st.floats(0, 3),
    st.floats(0, 1),
    st.sets(st.integers(0, 7), max_size=2),
)
def test_scores_and_order_are_those_of_the_formula(chunks, queries, k, k1, b, removed):
    chosen = Bm25Settings(k1, b)
    bm25 = Bm25(standin(chunks, removed=removed), chosen)
    ids, distances = bm25.search(np.array(queries), k)
    everything = np.broadcast_to(np.arange(len(chunks)), (len(queries), len(chunks)))
    scores = bm25.scores(np.array(queries), everything)
    for query, found, negated, scored in zip(queries, ids, distances, scores, strict=True):
        expected = by_formula(chunks, query, chosen, removed)
        np.testing.assert_allclose(scored, expected, rtol=1e-5, atol=1e-6)
        real = found[found >= 0]
        assert len(real) == len(set(real)) == min(k, int((expected > 0).sum()))
        np.testing.assert_allclose(-negated[: len(real)], np.sort(expected)[::-1][: len(real)], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(-negated[: len(real)], expected[real], rtol=1e-5, atol=1e-6)
        assert np.isinf(negated[len(real) :]).all()


def test_an_answer_does_not_depend_on_what_is_asked_with_it(monkeypatch):
    rng = np.random.default_rng(0)
    bm25 = Bm25(standin(rng.integers(0, VOCAB, (50, M))))
    queries = rng.integers(0, VOCAB, (20, M))
    expected = bm25.search(queries, 5)
    monkeypatch.setattr(bm25_module, "_SCORES_AT_ONCE", 60)
    alone = [np.concatenate(parts) for parts in zip(*(bm25.search(q[None], 5) for q in queries), strict=True)]
    for cut in (bm25.search(queries, 5), alone):
        for ours, theirs in zip(cut, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_equally_good_chunks_come_by_id_and_a_chunk_without_a_shared_token_is_no_result():
    bm25 = Bm25(standin([[5] * M, [6] * M, [5] * M, [5] * M]))
    ids, distances = bm25.search(np.array([[5] * M, [9] * M, [0] * M]), 2)
    assert ids.tolist() == [[0, 2], [-1, -1], [-1, -1]]
    assert distances[0, 0] == distances[0, 1] < 0 and np.isinf(distances[1:]).all()
    assert bm25.scores(np.array([[5] * M]), np.array([[-1, 1, 0]]))[0].tolist() == [0, 0, -distances[0, 0]]


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="k1 must not be negative"):
        Bm25Settings(k1=-1)
    with pytest.raises(UserError, match="b lies between 0 and 1"):
        Bm25Settings(b=1.5)


@pytest.fixture(scope="module")
def world(make_corpus, tmp_path_factory):
    """(database directory with a corpus alone, query corpus); documents of one group are in both."""

    def records(seeds, groups):
        texts = [" ".join(np.random.default_rng(seed).choice(WORDS, 60)) for seed in seeds]
        return [{"id": f"d{s}", "text": t, "group": f"g{s % groups}"} for s, t in zip(seeds, texts, strict=True)]

    directory = tmp_path_factory.mktemp("world")
    make_corpus([records(range(6), 4), records(range(6, 12), 4)], directory / "corpus")
    return directory, make_corpus([records(range(20, 23), 4), records(range(23, 25), 9)])


@pytest.mark.parametrize("filter", ["document", "none"])
def test_a_neighbours_stage_of_bm25_holds_the_best_chunks_of_other_documents(world, tmp_path, filter):
    directory, queries = world
    database = DatabaseCorpus(directory)
    manifest = find_neighbours(queries, directory, tmp_path / "n", k=5, filter=filter, bm25=Bm25Settings())
    table = NeighbourTable(tmp_path / "n", verify=True)
    chunks, every = np.arange(queries.num_chunks), np.arange(database.num_chunks)
    tokens = database.tokens(every).tolist()
    for chunk in chunks:
        scores = by_formula(tokens, queries.tokens(chunk).tolist(), Bm25Settings())
        if filter == "document":
            scores[database.document_keys(every) == queries.document_keys(chunk)] = 0
        best = np.sort(scores[scores > 0])[::-1][:5]
        found = -table.distances(np.array([chunk]))[0][: len(best)]
        np.testing.assert_allclose(found, best, rtol=1e-5)
        if filter == "document":
            hits = table.ids(np.array([chunk]))[0]
            assert not (database.document_keys(hits[hits >= 0]) == queries.document_keys(chunk)).any()
    assert manifest.counts["chunks"] == queries.num_chunks
    assert table.database_corpus_fingerprint == database.fingerprint


def test_other_settings_in_the_same_directory_and_what_bm25_does_not_need_are_refused(world, tmp_path):
    directory, queries = world
    find_neighbours(queries, directory, tmp_path / "a", k=4, bm25=Bm25Settings())
    with pytest.raises(UserError, match=r"settings\.bm25\.k1"):
        find_neighbours(queries, directory, tmp_path / "a", k=4, bm25=Bm25Settings(k1=2.0))
    with pytest.raises(UserError, match="neither service nor embeddings"):
        find_neighbours(queries, None, tmp_path / "c", bm25=Bm25Settings())


def test_reranking_orders_the_candidates_and_adds_none(world, tmp_path):
    directory, queries = world
    find_neighbours(queries, directory, tmp_path / "candidates", k=8, bm25=Bm25Settings(k1=0.0, b=0.0))
    candidates = NeighbourTable(tmp_path / "candidates")
    bm25 = Bm25.open(directory)
    rerank_neighbours(queries, candidates, bm25, tmp_path / "reranked", k=3)
    table, chunks = NeighbourTable(tmp_path / "reranked", verify=True), np.arange(queries.num_chunks)
    for chunk, ids, distances in zip(chunks, table.ids(chunks), table.distances(chunks), strict=True):
        offered = candidates.ids(chunk)
        scores = bm25.scores(queries.tokens(chunk[None]), offered[None])[0]
        assert set(ids) <= set(offered)
        np.testing.assert_array_equal(-distances, np.sort(np.where(offered >= 0, scores, -np.inf))[::-1][:3])
    assert (table.k, table.filter) == (3, "document")
    with pytest.raises(UserError, match="has 8 a chunk"):
        rerank_neighbours(queries, candidates, bm25, tmp_path / "more", k=9)
    with pytest.raises(UserError, match="of another corpus"):
        rerank_neighbours(bm25.corpus.parts[0], candidates, bm25, tmp_path / "other", k=3)
