"""Documents added are found, documents removed are not, and a compacted database holds exactly what was left."""

import json
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.corpus import Corpus
from retro_jax.data.duplicates import find_duplicates
from retro_jax.data.ranges import in_ranges, merge_ranges
from retro_jax.data.sequences import SequenceSource, write_sequences
from retro_jax.data.stage import Stage
from retro_jax.errors import UserError
from retro_jax.lock import DirectoryLock
from retro_jax.retrieval import compaction, update
from retro_jax.retrieval.compaction import compact_database
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import EmbeddingSet, embed_corpus
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.index import Index
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours
from retro_jax.retrieval.segments import DatabaseCorpus, Segments
from retro_jax.retrieval.update import add_documents, default_settings, remove_documents

WORDS = re.findall(r"\S+", "the cat of a house and 3 birds sing in the tree while it rains, he said; nobody came.")


def record(seed: int) -> dict:
    text = " ".join(np.random.default_rng(seed).choice(WORDS, 30 + 5 * seed))
    return {"id": f"d{seed}", "text": text, "group": f"g{seed // 2}"}


def write(path, seeds) -> list:
    path.write_text("".join(json.dumps(record(seed)) + "\n" for seed in seeds))
    return [path]


@pytest.fixture
def database(make_corpus, tiny_embedder, tmp_path):
    """Directory of a database of documents 0 to 5 in two shards of text and of index."""
    directory = tmp_path / "DB"
    corpus = make_corpus([[record(i) for i in range(4)], [record(4), record(5)]], directory / "corpus")
    embed_corpus(corpus, tiny_embedder, directory / "embeddings")
    build_index(EmbeddingSet(directory / "embeddings"), directory / "index", num_shards=2)
    return directory


def documents_of(database: Database, ids: np.ndarray) -> set[str]:
    found = database.corpus.document_index(np.unique(ids[ids >= 0]))
    return {database.corpus.document(int(index)).id for index in np.unique(found)}


def everything(database: Database, embedder) -> np.ndarray:
    """All that any search gives: a search for every chunk of every document, of all there is."""
    corpus = database.corpus
    vectors = embedder.embed_chunks(corpus.tokens(np.arange(corpus.num_chunks)), corpus.tokenizer).vectors
    ids, _ = database.search(vectors, corpus.num_chunks + 3)
    return ids


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12))
@settings(max_examples=100)
def test_ranges_are_the_same_numbers(pairs):
    merged = merge_ranges(np.array(pairs, np.int64).reshape(-1, 2))
    numbers = np.arange(-2, 45)
    expected = [any(first <= number < stop for first, stop in pairs) for number in numbers.tolist()]
    np.testing.assert_array_equal(in_ranges(numbers, merged), expected)
    assert (merged[:, 0] < merged[:, 1]).all() and (merged[1:, 0] > merged[:-1, 1]).all()


def test_added_documents_are_found_behind_those_before(database, tiny_embedder, tmp_path):
    before = Database.open(database)
    add_documents(database, write(tmp_path / "new.jsonl", [6, 7]), tiny_embedder)
    after = Database.open(database, tiny_embedder)
    assert after.fingerprint != before.fingerprint
    assert after.num_index_shards == 3 and after.index_shards == (0, 1, 2)
    old = before.corpus.num_chunks
    np.testing.assert_array_equal(after.corpus.tokens(np.arange(old)), before.corpus.tokens(np.arange(old)))
    new = np.arange(old, after.corpus.num_chunks)
    texts = "".join(after.texts(new))
    assert texts == record(6)["text"] + record(7)["text"]
    found = after.retrieve(after.corpus.tokens(new), 2)
    worded = found.ids[:, 0] >= 0
    assert worded.sum() >= len(new) - 2 and (found.distances[worded, 0] < 1e-6).all()
    np.testing.assert_array_equal(after.corpus.tokens(found.ids[worded, 0]), after.corpus.tokens(new[worded]))
    np.testing.assert_array_equal(found.tokens, after.neighbour_tokens(found.ids))
    assert documents_of(after, everything(after, tiny_embedder)) == {f"d{i}" for i in range(8)}
    # The same as an exact search of all vectors.
    parts = [EmbeddingSet(folder / "embeddings") for folder in (database, database / "additions" / "00001")]
    vectors = np.concatenate([part[0 : len(part)] for part in parts])
    real = np.flatnonzero(vectors.any(1))
    ids, distances = after.search(vectors, 5)
    expected, squares = exact_search(vectors[real], vectors[real], 5)
    np.testing.assert_allclose(distances[real], squares, rtol=1e-5, atol=1e-6)
    assert (ids[real, 0] == real[expected[:, 0]]).mean() > 0.9


def test_near_duplicates_of_evaluation_documents_are_not_added(database, tiny_embedder, tmp_path):
    inputs = write(tmp_path / "new.jsonl", [6, 7, 8])
    find_duplicates(inputs, write(tmp_path / "valid.jsonl", [7]), tmp_path / "duplicates")
    add_documents(database, inputs, tiny_embedder, exclusions=tmp_path / "duplicates")
    after = Database.open(database)
    assert documents_of(after, everything(after, tiny_embedder)) == {"d0", "d1", "d2", "d3", "d4", "d5", "d6", "d8"}
    with pytest.raises(UserError, match=r"other\.jsonl: .* was not made for this file"):
        add_documents(database, write(tmp_path / "other.jsonl", [9]), tiny_embedder, exclusions=tmp_path / "duplicates")


def test_shards_of_base_and_additions_are_numbered_through(database, tiny_embedder, tmp_path):
    add_documents(database, write(tmp_path / "new.jsonl", [6, 7]), tiny_embedder)
    whole = Database.open(database)
    parts = [Database.open(database, index_shards=chosen) for chosen in ([0], [1, 2])]
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    assert sum(part.size for part in parts) == whole.size
    with pytest.raises(UserError, match="has index shards 0 to 2, not 3"):
        Database.open(database, index_shards=[1, 3])


def test_removed_documents_are_found_by_no_search(database, tiny_embedder, tmp_path):
    add_documents(database, write(tmp_path / "new.jsonl", [6, 7]), tiny_embedder)
    before = Database.open(database)
    assert remove_documents(database, ids=["d1", "d6"], groups=["g2"])[0] == 4  # g2: d4, d5
    after = Database.open(database)
    assert after.fingerprint != before.fingerprint
    ids = everything(after, tiny_embedder)
    assert documents_of(after, ids) == {"d0", "d2", "d3", "d7"}
    assert not after.corpus.removed(ids[ids >= 0]).any()
    # And with another document left out as well.
    keys = after.document_keys(np.arange(after.corpus.num_chunks))
    vectors = tiny_embedder.embed_chunks(
        after.corpus.tokens(np.arange(after.corpus.num_chunks)), after.corpus.tokenizer
    ).vectors
    ids, _ = after.search(vectors, 200, exclude_keys=np.full(len(keys), keys[0]))
    assert documents_of(after, ids) == {"d2", "d3", "d7"}  # d0 and d1 are one group
    assert remove_documents(database, ids=["d1"]) == (0, 0)
    assert Database.open(database).fingerprint == after.fingerprint
    assert Database.open(database).describe()["removed_chunks"] > 0


def test_a_document_may_come_back_after_its_removal(database, tiny_embedder, tmp_path):
    inputs = write(tmp_path / "again.jsonl", [3])
    with pytest.raises(UserError, match="already has a document 'd3'; remove it first"):
        add_documents(database, inputs, tiny_embedder)
    assert Segments.load(database).version == 0
    remove_documents(database, ids=["d3"])
    add_documents(database, inputs, tiny_embedder)
    after = Database.open(database)
    ids = everything(after, tiny_embedder)
    assert "d3" in documents_of(after, ids) and not after.corpus.removed(ids[ids >= 0]).any()


def test_a_base_with_a_tuned_tree_takes_small_additions_and_shrinks(make_corpus, tiny_embedder, tmp_path):
    directory = tmp_path / "DB"
    corpus = make_corpus([[record(i) for i in range(20, 26)]], directory / "corpus")
    embed_corpus(corpus, tiny_embedder, directory / "embeddings")
    tuned = IndexSettings(kind="tree", num_leaves=32, leaves_to_search=32, reorder=64, training_sample=90)
    build_index(EmbeddingSet(directory / "embeddings"), directory / "index", tuned)
    assert default_settings(directory) == IndexSettings(reorder=64, training_sample=90)
    add_documents(directory, write(tmp_path / "new.jsonl", [6]), tiny_embedder, settings=default_settings(directory))
    after = Database.open(directory, tiny_embedder)
    assert [index.manifest.counts["kinds"] for index in after.indexes] == [["tree"], ["brute_force"]]
    assert "d6" in documents_of(after, everything(after, tiny_embedder))
    remove_documents(directory, ids=[f"d{i}" for i in range(20, 25)])
    compact_database(directory, tmp_path / "DB2", settings=default_settings(directory))
    left = Database.open(tmp_path / "DB2", tiny_embedder)
    assert documents_of(left, everything(left, tiny_embedder)) == {"d25", "d6"}


def test_a_document_shorter_than_a_chunk_is_added_alone_and_outlives_the_rest(database, tiny_embedder, tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps({"id": "short", "text": "a cat"}) + "\n")
    add_documents(database, [path], tiny_embedder)
    after = Database.open(database, tiny_embedder)
    chunk = after.corpus.num_chunks - 1
    assert after.texts([chunk]) == ["a cat"]
    assert after.retrieve(after.corpus.tokens([chunk]), 1).ids.tolist() == [[chunk]]
    remove_documents(database, ids=[f"d{i}" for i in range(6)])
    compact_database(database, tmp_path / "DB2")
    assert Database.open(tmp_path / "DB2").texts([0]) == ["a cat"]
    remove_documents(database, ids=["short"])
    with pytest.raises(UserError, match="nothing is left of it"):
        compact_database(database, tmp_path / "DB3")


def test_files_of_one_name_without_ids_are_told_apart_by_another_name(database, tiny_embedder, tmp_path):
    paths = [tmp_path / day / "new.jsonl" for day in ("monday", "tuesday")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps({"text": f"the cat of {path.parent.name} sings in the tree and nobody came"}) + "\n")
    add_documents(database, paths[:1], tiny_embedder)
    with pytest.raises(UserError, match=r"already has a document 'new\.jsonl:1'; .* name the file otherwise"):
        add_documents(database, paths[1:], tiny_embedder)
    add_documents(database, [paths[1].rename(tmp_path / "tuesday.jsonl")], tiny_embedder)
    corpus = DatabaseCorpus(database)
    assert [corpus.document(i).id for i in (6, 7)] == ["new.jsonl:1", "tuesday.jsonl:1"]


def test_mistakes_change_nothing(database, tiny_embedder, tmp_path):
    with pytest.raises(UserError, match="has no document 'd77', 'd78'"):
        remove_documents(database, ids=["d0", "d78", "d77"])
    with pytest.raises(UserError, match="has no group 'x'"):
        remove_documents(database, groups=["x"])
    (tmp_path / "bad.jsonl").write_bytes(b'{"id": "n", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not UTF-8"):
        add_documents(database, [tmp_path / "bad.jsonl"], tiny_embedder)
    assert not (database / "segments.json").exists()
    with DirectoryLock(database, "wait"), pytest.raises(UserError, match="is in use by process"):
        remove_documents(database, ids=["d0"])
    remove_documents(database, ids=["d0"])
    (database / "removed-00001.npy").write_bytes(b"x")
    with pytest.raises(UserError, match=r"removed-00001\.npy: checksum differs"):
        Database.open(database)
    (database / "segments.json").write_text("[]")
    with pytest.raises(UserError, match="does not say what the database consists of"):
        Database.open(database)


def test_an_interrupted_addition_is_not_seen_and_goes_on(database, tiny_embedder, tmp_path, monkeypatch):
    inputs = write(tmp_path / "new.jsonl", [6, 7])
    before = Database.open(database).fingerprint

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(update, "build_index", stop)
        with pytest.raises(KeyboardInterrupt):
            add_documents(database, inputs, tiny_embedder)
    assert Database.open(database).fingerprint == before
    add_documents(database, inputs, tiny_embedder)
    assert Database.open(database).corpus.segments.additions == ("00001",)


def test_a_removal_does_not_wait_for_an_addition_and_another_addition_does(
    database, tiny_embedder, tmp_path, monkeypatch
):
    other, real = write(tmp_path / "other.jsonl", [8]), update.embed_corpus

    def meanwhile(*arguments):
        assert remove_documents(database, ids=["d1"])[0] == 1
        with pytest.raises(UserError, match=r"additions is in use by process .*; wait for that change"):
            add_documents(database, other, tiny_embedder)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(update, "embed_corpus", meanwhile)
        add_documents(database, write(tmp_path / "new.jsonl", [6, 7]), tiny_embedder)
    after = Database.open(database)
    assert (after.corpus.segments.version, after.corpus.segments.additions) == (2, ("00001",))
    assert documents_of(after, everything(after, tiny_embedder)) == {"d0", "d2", "d3", "d4", "d5", "d6", "d7"}
    with DirectoryLock(database, "wait"), pytest.raises(UserError, match="the addition is made: run this again"):
        add_documents(database, other, tiny_embedder)
    add_documents(database, other, tiny_embedder)
    assert Segments.load(database).additions == ("00001", "00002")


def test_compaction_holds_what_was_left_and_nothing_else(database, make_corpus, tiny_embedder, tmp_path):
    add_documents(database, write(tmp_path / "new.jsonl", [6, 7]), tiny_embedder)
    remove_documents(database, ids=["d0", "d5", "d6"])
    old = DatabaseCorpus(database)
    compact_database(database, tmp_path / "DB2", num_shards=2)
    corpus = Corpus(tmp_path / "DB2" / "corpus", verify=True)
    direct = make_corpus([[record(1), record(2), record(3)], [record(4)], [record(7)]])
    for name in ("tokens", "lengths", "byte_counts", "document_index", "document_keys", "continuation"):
        chunks = np.arange(direct.num_chunks)
        np.testing.assert_array_equal(getattr(corpus, name)(chunks), getattr(direct, name)(chunks))
    assert [corpus.document(i) for i in range(5)] == [direct.document(i) for i in range(5)]
    for key in ("documents", "chunks", "tokens", "bytes"):
        assert corpus.manifest.counts[key] == direct.manifest.counts[key]
    kept = np.flatnonzero(~old.removed(np.arange(old.num_chunks)))
    folders = (database, database / "additions" / "00001")
    vectors = np.concatenate([EmbeddingSet(folder / "embeddings")[0 : 10**6] for folder in folders])
    copied = EmbeddingSet(tmp_path / "DB2" / "embeddings", verify=True)
    np.testing.assert_array_equal(copied[0 : len(copied)], vectors[kept])
    compacted, changed = Database.open(tmp_path / "DB2", tiny_embedder), Database.open(database)
    number = np.full(old.num_chunks, -1)
    number[kept] = np.arange(len(kept))
    real = vectors[kept].any(1)
    ours, theirs = compacted.search(vectors[kept][real], 4), changed.search(vectors[kept][real], 4)
    np.testing.assert_array_equal(ours[0], np.where(theirs[0] >= 0, number[theirs[0]], -1))
    # ScaNN's sums differ in the last bit with a vector's place in its shard.
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6, atol=1e-7)
    remove_documents(database, ids=["d1"])
    with pytest.raises(UserError, match=r"inputs\.database"):
        compact_database(database, tmp_path / "DB2", num_shards=2)


def test_what_is_removed_while_it_is_compacted_does_not_come_back(database, tmp_path, monkeypatch):
    real = compaction.build_index

    def removing(*arguments, **options):
        remove_documents(database, ids=["d1"])
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "build_index", removing)
        with pytest.raises(UserError, match=r"was changed while it was compacted \(version 0, now 1\): remove .*DB2"):
            compact_database(database, tmp_path / "DB2")
    with pytest.raises(UserError, match="begun and not finished"):
        Index.load(tmp_path / "DB2" / "index")
    with pytest.raises(UserError, match=r"inputs\.database"):
        compact_database(database, tmp_path / "DB2")
    compact_database(database, tmp_path / "DB3")
    assert Corpus(tmp_path / "DB3" / "corpus").num_documents == 5


def test_nothing_is_removed_between_the_last_look_and_the_end_of_a_compaction(database, tmp_path, monkeypatch):
    real, refused = Stage.finish, []

    def removing(stage, counts):
        if stage.name == "index":
            with pytest.raises(UserError, match="is in use by process"):
                remove_documents(database, ids=["d1"])
            refused.append("d1")
        return real(stage, counts)

    monkeypatch.setattr(Stage, "finish", removing)
    compact_database(database, tmp_path / "DB2")
    assert refused == ["d1"] and Segments.load(database).version == 0
    assert remove_documents(database, ids=["d1"])[0] == 1


def test_readers_never_see_half_a_change(database):
    """While documents are removed one by one, every reading is of one version, whole."""
    corpus = DatabaseCorpus(database)
    records = [corpus.document(number) for number in range(6)]
    ranges = [(each.first_chunk, each.first_chunk + each.chunks) for each in records]
    seen, failures, ended = [], [], threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                segments = Segments.load(database)
                seen.append((segments.version, segments.removed.tolist()))
        except Exception as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(6):
            remove_documents(database, ids=[f"d{number}"])
    finally:
        ended.set()
        reader.join()
    for version, removed in seen:
        assert removed == merge_ranges(np.array(ranges[:version])).tolist()
    assert seen and not failures


def test_a_reader_that_changes_overtook_reads_the_latest(database, monkeypatch):
    remove_documents(database, ids=["d0"])
    with_removed, versions = Segments._with_removed, []

    def overtaken(segments, directory):
        versions.append(segments.version)
        monkeypatch.undo()
        for number in (1, 2):
            remove_documents(database, ids=[f"d{number}"])
        assert not (directory / segments.removed_file).exists()
        return with_removed(segments, directory)

    monkeypatch.setattr(Segments, "_with_removed", overtaken)
    assert Segments.load(database).version == 3 and versions == [1]
    (database / "removed-00003.npy").unlink()
    with pytest.raises(UserError, match="the list of removed documents is missing; restore it"):
        Segments.load(database)


def test_sequences_hold_neighbours_from_additions(database, make_corpus, tiny_embedder, tmp_path):
    add_documents(database, write(tmp_path / "new.jsonl", [6, 7]), tiny_embedder)
    queries = make_corpus([[record(6) | {"group": "another"}]])
    embed_corpus(queries, tiny_embedder, tmp_path / "embeddings")
    embeddings = EmbeddingSet(tmp_path / "embeddings")
    find_neighbours(queries, database, tmp_path / "neighbours", k=3, embeddings=embeddings)
    corpus, table = DatabaseCorpus(database), NeighbourTable(tmp_path / "neighbours")
    nearest = table.ids(np.arange(queries.num_chunks))[:, 0]
    worded = nearest >= 0
    np.testing.assert_array_equal(corpus.tokens(nearest[worded]), queries.tokens(np.flatnonzero(worded)))
    assert nearest.max() >= Corpus(database / "corpus").num_chunks
    write_sequences(queries, table, corpus, tmp_path / "sequences", length=32, k=2)
    first = SequenceSource(tmp_path / "sequences")[0]
    np.testing.assert_array_equal(first["neighbours"][0, 0], corpus.neighbour_tokens(nearest[0]))


def test_sequences_hold_no_neighbours_that_were_removed_since_they_were_found(database, tmp_path):
    corpus = Corpus(database / "corpus")
    find_neighbours(corpus, database, tmp_path / "neighbours", k=6)
    table = NeighbourTable(tmp_path / "neighbours")

    def written(name):
        state = DatabaseCorpus(database)
        directory = tmp_path / name
        manifest = write_sequences(corpus, table, state, directory, length=32, k=2, removed=state.segments.removed)
        source = SequenceSource(directory)
        rows = [source[i] for i in range(len(source))]
        return manifest, {name: np.concatenate([row[name] for row in rows]) for name in ("chunks", "neighbour_ids")}

    before, whole = written("before")
    assert DatabaseCorpus(database).removed_documents(corpus) == 0
    remove_documents(database, ids=["d2", "d4"])
    state = DatabaseCorpus(database)
    assert state.removed(whole["neighbour_ids"]).any()
    after, left = written("after")
    assert not state.removed(left["neighbour_ids"][left["neighbour_ids"] >= 0]).any()
    # What is nearest of the rest comes in their place, and the text is that of the corpus.
    keys = corpus.document_keys(whole["chunks"])
    np.testing.assert_array_equal(left["chunks"], whole["chunks"])
    for chunk, key, found in zip(left["chunks"], keys, left["neighbour_ids"], strict=True):
        offered = [] if chunk < 0 else table.ids(np.array([chunk]))[0]
        kept = [i for i in offered if i >= 0 and corpus.document_keys(i) != key and not state.removed(i)]
        assert found.tolist() == [*kept, -1, -1][:2]
    assert state.removed_documents(corpus) == 2
    assert after.inputs.keys() - before.inputs.keys() == {"removed"}
    with pytest.raises(UserError, match=r"inputs\.removed = absent"):
        written("before")
