"""The table of neighbours is what a loop over all distances gives, whole or resumed, and readable by itself."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.distribute import BeamOptions
from retro_jax.errors import UserError
from retro_jax.retrieval import index as index_module
from retro_jax.retrieval import neighbours as neighbours_module
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours, search_distinct

WORDS = re.findall(r"\S+", "the cat of a house and 3 birds sing in the tree while it rains, he said; nobody came.")


def records(seeds: range, groups: int) -> list[dict]:
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS, 40 + seed)) for seed in seeds]
    return [
        {"id": f"d{seed}", "text": text, "group": f"g{seed % groups}"} for seed, text in zip(seeds, texts, strict=True)
    ]


def write_vectors(make_embeddings, corpus, directory, seed: int, empty: list[int]) -> EmbeddingSet:
    """Random vectors for a corpus, by its shards; some chunks count as without word pieces."""
    vectors = np.random.default_rng(seed).normal(size=(corpus.num_chunks, 6)).astype(np.float32)
    vectors[empty] = 0
    shards = np.split(vectors, np.asarray(corpus.shard_offsets)[1:-1])
    return make_embeddings(shards, corpus=corpus.fingerprint, directory=directory)


@pytest.fixture(scope="module")
def world(make_corpus, make_embeddings, tmp_path_factory):
    """(database directory, its corpus, query corpus, query embeddings); 3 of the groups are in both corpora."""
    root = tmp_path_factory.mktemp("world")
    documents = records(range(12), 7)
    corpus = make_corpus([documents[:5], documents[5:9], documents[9:]], root / "database" / "corpus")
    embeddings = write_vectors(make_embeddings, corpus, root / "database" / "embeddings", 1, [0, 7])
    build_index(embeddings, root / "database" / "index")
    queries = make_corpus([records(range(18, 21), 21), records(range(21, 24), 7)], root / "queries")
    query_embeddings = write_vectors(make_embeddings, queries, root / "query_embeddings", 2, [3])
    return root / "database", corpus, queries, query_embeddings


def oracle(queries, query_vectors, corpus, vectors, k: int, drop_same: bool):
    """(ids, distances) by a loop over every pair."""
    ids = np.full((len(query_vectors), k), -1)
    distances = np.full((len(query_vectors), k), np.inf)
    for i, query in enumerate(query_vectors):
        candidates = []
        for j, vector in enumerate(vectors):
            same = drop_same and queries.document_keys(i) == corpus.document_keys(j)
            if query.any() and vector.any() and not same:
                candidates.append((((query.astype(np.float64) - vector) ** 2).sum(), j))
        for place, (square, j) in enumerate(sorted(candidates)[:k]):
            ids[i, place], distances[i, place] = j, square
    return ids, distances


@pytest.mark.parametrize("filter", ["document", "none"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("k", [3, 100])
def test_table_equals_the_loop_over_all_pairs(world, tmp_path, filter, own, k):
    directory, corpus, queries, query_embeddings = world
    embeddings = EmbeddingSet(directory / "embeddings")
    if own:
        queries, query_embeddings = corpus, embeddings
    manifest = find_neighbours(
        queries, directory, tmp_path / "n", k=k, filter=filter, embeddings=None if own else query_embeddings
    )
    expected = oracle(
        queries,
        query_embeddings[0 : len(query_embeddings)],
        corpus,
        embeddings[0 : len(embeddings)],
        k,
        filter == "document",
    )
    table = NeighbourTable(tmp_path / "n", verify=True)
    chunks = np.arange(queries.num_chunks)
    np.testing.assert_array_equal(table.ids(chunks), expected[0])
    np.testing.assert_allclose(table.distances(chunks), expected[1], rtol=1e-6)
    found = (expected[0] >= 0).sum(1)
    assert manifest.counts["survivors"] == np.bincount(found, minlength=k + 1).tolist()
    assert manifest.counts["fewer_than_k"] == (found < k).sum()
    assert manifest.counts["empty"] == (2 if own else 1)
    assert manifest.counts["chunks"] == len(table) == queries.num_chunks
    assert (table.k, table.corpus_fingerprint, table.filter) == (k, queries.fingerprint, filter)
    assert table.database_fingerprint == Database.open(directory).fingerprint
    if not own and filter == "document":
        shared = np.isin(queries.document_keys(chunks), corpus.document_keys(np.arange(corpus.num_chunks)))
        assert shared.any() and not shared.all()


def test_reader_takes_any_shape_and_minus_one(world, tmp_path):
    directory, corpus, *_ = world
    find_neighbours(corpus, directory, tmp_path / "n", k=2)
    table = NeighbourTable(tmp_path / "n")
    ids, distances = table.ids(np.array([[5, -1], [9, 1]])), table.distances(np.array([-1, 5]))
    assert ids.shape == (2, 2, 2) and ids.dtype == np.int64 and (ids[0, 1] == -1).all()
    assert distances.dtype == np.float32 and np.isinf(distances[0]).all() and np.isfinite(distances[1]).all()
    np.testing.assert_array_equal(ids[0, 0], table.ids(np.array(5)))
    with pytest.raises(IndexError):
        table.ids(np.array([corpus.num_chunks]))


def test_an_index_is_loaded_by_who_searches_it_and_once(world, tmp_path, monkeypatch):
    directory, corpus, *_ = world
    loaded, before = [], []

    def load(*arguments):
        loaded.append(arguments)
        return real_load(*arguments)

    def distribute(*arguments, **options):
        before.append(len(loaded))
        real_distribute(*arguments, **options)

    real_load, real_distribute = index_module._load_shard, neighbours_module.distribute
    monkeypatch.setattr(index_module, "_load_shard", load)
    monkeypatch.setattr(neighbours_module, "distribute", distribute)
    find_neighbours(corpus, directory, tmp_path / "n", k=2)
    assert before == [0] and len(loaded) == 1 and len(corpus.shard_offsets) == 4


def test_a_search_that_failed_goes_on_with_the_shards_that_lack(world, tmp_path, monkeypatch):
    directory, corpus, *_ = world
    whole = find_neighbours(corpus, directory, tmp_path / "whole", k=4)
    real, calls = Database.search, []

    def failing(self, vectors, k, exclude_keys=None):
        calls.append(len(vectors))
        if len(calls) == 2:
            raise UserError("the disk is on fire")
        return real(self, vectors, k, exclude_keys)

    monkeypatch.setattr(Database, "search", failing)
    with pytest.raises(UserError, match="the disk is on fire"):
        find_neighbours(corpus, directory, tmp_path / "resumed", k=4)
    assert find_neighbours(corpus, directory, tmp_path / "resumed", k=4).fingerprint == whole.fingerprint
    sizes = np.diff(corpus.shard_offsets).tolist()
    assert len(sizes) == 3 and len(calls) == 4 and sorted(set(calls)) == sorted(set(sizes))
    with pytest.raises(UserError, match=r"settings\.k = 4, now it is 5"):
        find_neighbours(corpus, directory, tmp_path / "resumed", k=5)


def test_several_processes_write_the_same_bytes(world, tmp_path):
    directory, corpus, *_ = world
    one = find_neighbours(corpus, directory, tmp_path / "one", k=4)
    two = find_neighbours(corpus, directory, tmp_path / "two", k=4, options=BeamOptions(workers=2))
    assert one == two


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_distinct_neighbours_equal_the_loop_over_all_hits(seed, size, k, texts):
    rng = np.random.default_rng(seed)
    vectors, tokens = rng.normal(size=(size, 3)).astype(np.float32), rng.integers(0, texts, size)
    queries = rng.normal(size=(5, 3)).astype(np.float32)

    class Searcher:
        def search(self, vectors_, k, exclude_keys):
            return exact_search(vectors_, vectors, k)

        def neighbour_tokens(self, ids):
            return np.where(ids >= 0, tokens[np.maximum(ids, 0)], 0)[..., None] * np.array([1, 2, 0, 9])

    ids, distances, dropped = search_distinct(Searcher(), queries, k, None, 2)
    every, squares = exact_search(queries, vectors, size)
    expected = 0
    for i in range(5):
        kept, seen, reach = [], set(), size
        for place, chunk in enumerate(every[i].tolist()):
            if len(kept) == k:
                reach = place
                break
            if tokens[chunk] not in seen:
                kept.append(place)
                seen.add(tokens[chunk])
        np.testing.assert_array_equal(ids[i, : len(kept)], every[i, kept])
        np.testing.assert_allclose(distances[i, : len(kept)], squares[i, kept], rtol=1e-6)
        assert (ids[i, len(kept) :] == -1).all() and np.isinf(distances[i, len(kept) :]).all()
        expected += reach - len(kept)
    assert dropped == expected


def test_distinct_neighbours_are_looked_for_among_so_many_and_no_more(monkeypatch):
    """As a service has a limit, and its answer and that of the database here are to be the same."""
    monkeypatch.setattr(neighbours_module, "DISTINCT_AMONG", 20)
    monkeypatch.setattr(neighbours_module, "_COMPARED_AT_ONCE", 50)
    asked, compared = [], []

    class Line:
        """Chunks 0 to 59 at these places; the first 15 have the same tokens."""

        def search(self, queries, k, exclude_keys):
            asked.append(k)
            return np.tile(np.arange(k), (len(queries), 1)), np.tile(np.arange(k, dtype=np.float32), (len(queries), 1))

        def neighbour_tokens(self, ids):
            compared.append(ids.size)
            return np.repeat(np.where(ids < 15, 0, ids)[..., None], 4, axis=-1)

    ids, distances, dropped = search_distinct(Line(), np.ones((5, 1)), 8, None, 2)
    assert ids.tolist() == [[0, 15, 16, 17, 18, 19, -1, -1]] * 5 and dropped == 5 * 14
    assert distances[0, :6].tolist() == ids[0, :6].tolist() and np.isinf(distances[:, 6:]).all()
    assert asked == [16, 20] and max(compared) <= 50
    asked.clear()
    ids, _, _ = search_distinct(Line(), np.ones((1, 1)), 25, None, 2)
    assert asked == [25] and ids[0].tolist() == [0, *range(15, 25), *[-1] * 14]


def test_a_database_that_changed_meanwhile_is_refused(world, tmp_path, monkeypatch):
    directory, corpus, *_ = world
    searched = neighbours_module._searched
    monkeypatch.setattr(
        neighbours_module, "_searched", lambda asked: dataclasses.replace(searched(asked), database="earlier")
    )
    with pytest.raises(UserError, match="it was earlier when the search began"):
        find_neighbours(corpus, directory, tmp_path / "n", k=2)


def test_wrong_inputs_are_refused(world, make_embeddings, make_corpus, tmp_path):
    directory, corpus, queries, query_embeddings = world
    with pytest.raises(UserError, match="is not the database's corpus"):
        find_neighbours(queries, directory, tmp_path / "n")
    with pytest.raises(UserError, match="was not made from"):
        find_neighbours(corpus, directory, tmp_path / "n", embeddings=query_embeddings)
    foreign = make_embeddings([np.ones((queries.num_chunks, 6))], corpus=queries.fingerprint, embedder="other")
    with pytest.raises(UserError, match="is other, the database was embedded with facade"):
        find_neighbours(queries, directory, tmp_path / "n", embeddings=foreign)
    with pytest.raises(UserError, match="filter 'all' is not one of document, none"):
        find_neighbours(corpus, directory, tmp_path / "n", filter="all")
    with pytest.raises(UserError, match="k must be at least 1"):
        find_neighbours(corpus, directory, tmp_path / "n", k=0)
    assert not (tmp_path / "n").exists()


def test_a_corpus_of_another_tokenizer_is_refused(world, make_embeddings, tmp_path, monkeypatch):
    directory, _, queries, query_embeddings = world
    monkeypatch.setattr(queries, "tokenizer_fingerprint", "another")
    with pytest.raises(UserError, match="has tokenizer_fingerprint another"):
        find_neighbours(queries, directory, tmp_path / "n", embeddings=query_embeddings)


def test_reading_a_table_needs_no_search_library(world, tmp_path):
    directory, corpus, *_ = world
    find_neighbours(corpus, directory, tmp_path / "n", k=2)
    script = f"""
import sys
for name in ("scann", "tensorflow", "tensorflow_text", "safetensors", "tokenizers"):
    sys.modules[name] = None
from retro_jax.retrieval.neighbours import NeighbourTable
import numpy as np
print(NeighbourTable({str(tmp_path / "n")!r}).ids(np.arange(3)).shape)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "(3, 2)", result.stderr


def test_damage_is_found(world, tmp_path):
    directory, corpus, *_ = world
    manifest = find_neighbours(corpus, directory, tmp_path / "n", k=2)
    shard = tmp_path / "n" / manifest.shards[1].name
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard.name}: checksum differs"):
        NeighbourTable(tmp_path / "n", verify=True)
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shard.name}: .* bytes, the manifest says"):
        NeighbourTable(tmp_path / "n")
