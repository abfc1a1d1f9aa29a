"""The ScaNN index answers rightly at every edge where ScaNN itself would crash, lie, or fall silent."""

import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.index import Index
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.index_settings import IndexSettings


def clustered(n: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Vectors around 20 centres, as embeddings of texts are: not evenly spread."""
    rng = np.random.default_rng(seed)
    return (2 * rng.normal(size=(20, width))[rng.integers(0, 20, n)] + rng.normal(size=(n, width))).astype(np.float32)


@pytest.fixture(scope="module")
def small(make_embeddings, tmp_path_factory):
    """(directory, vectors) of a brute-force index over 2 shards with empty chunks at 3 and 40."""
    vectors = clustered(60)
    vectors[[3, 40]] = 0
    directory = tmp_path_factory.mktemp("index") / "small"
    build_index(make_embeddings([vectors[:25], vectors[25:]]), directory)
    return directory, vectors


@pytest.fixture(scope="module")
def tree(make_embeddings, tmp_path_factory):
    """(directory, vectors) of a tree over 2000 vectors that visits 2 of 40 leaves and rescores 20."""
    vectors = clustered(2000)
    directory = tmp_path_factory.mktemp("index") / "tree"
    chosen = IndexSettings(kind="tree", num_leaves=40, leaves_to_search=2, reorder=20)
    build_index(make_embeddings([vectors]), directory, chosen, recall_queries=64, min_recall=0)
    return directory, vectors


def test_brute_force_is_exact_and_skips_empty_chunks(small):
    directory, vectors = small
    index = Index.load(directory)
    real = np.flatnonzero(vectors.any(1))
    queries = clustered(9, seed=1)
    ids, distances = index.search(queries, 5)
    rows, expected = exact_search(queries, vectors[real], 5)
    np.testing.assert_array_equal(ids, real[rows])
    np.testing.assert_allclose(distances, expected, rtol=1e-6)
    assert index.size == 58 and index.manifest.counts["empty"] == 2
    assert ids.dtype == np.int64 and distances.dtype == np.float32


def test_recall_is_measured_and_stored(small, tree):
    counts = Index.load(small[0]).manifest.counts
    assert (counts["recall_at_2"], counts["recall_at_10"], counts["recall_queries"]) == (1, 1, 58)
    index = Index.load(tree[0])
    counts = index.manifest.counts
    assert 0.3 < counts["recall_at_10"] <= 1 and counts["recall_queries"] == 64
    # Measured again by hand over all vectors: the stored figure is that of a sample.
    found = index.search(tree[1], 11)[0]
    exact = exact_search(tree[1], tree[1], 11)[0]
    own = np.arange(2000)[:, None]
    hits = [len(set(a[a != i][:10]) & set(b[b != i][:10])) for a, b, i in zip(found, exact, own, strict=True)]
    assert abs(np.mean(hits) / 10 - counts["recall_at_10"]) < 0.12


def test_more_leaves_give_more_recall(make_embeddings, tmp_path, tree):
    chosen = IndexSettings(kind="tree", num_leaves=40, leaves_to_search=40, reorder=400)
    counts = build_index(make_embeddings([tree[1]]), tmp_path / "all", chosen, recall_queries=64).counts
    assert counts["recall_at_10"] > 0.99


@pytest.mark.parametrize("fixture", ["small", "tree"])
def test_asking_for_more_than_there_is_gives_minus_one_never_a_false_chunk_zero(request, fixture):
    directory, vectors = request.getfixturevalue(fixture)
    index = Index.load(directory)
    ids, distances = index.search(vectors[5:8], index.size + 7)
    assert (ids[:, index.size :] == -1).all() and np.isinf(distances[:, index.size :]).all()
    for row in ids[:, : index.size]:
        assert sorted(row) == np.flatnonzero(vectors.any(1)).tolist()
    assert np.isfinite(distances[:, : index.size]).all()
    assert (np.diff(distances[:, : index.size], axis=1) >= 0).all()


@given(st.integers(1, 2100), st.integers(0, 10**6))
@settings(deadline=None, max_examples=15)
def test_tree_fills_every_place_with_different_chunks_in_order(tree, k, seed):
    """k beyond the visited leaves (ScaNN pads with id 0) and beyond the rescored (ScaNN cuts the answer)."""
    directory, vectors = tree
    index = Index.load(directory, verify=False)
    queries = clustered(3, seed=seed)
    ids, distances = index.search(queries, k)
    for row, squares, query in zip(ids, distances, queries, strict=True):
        found = row[row >= 0]
        assert len(found) == len(set(found.tolist())) == min(k, 2000)
        np.testing.assert_allclose(squares[: len(found)], ((vectors[found] - query) ** 2).sum(1), rtol=1e-5)
        assert (np.diff(squares[: len(found)]) >= 0).all()


def test_rows_that_are_not_finite_are_refused_before_scann_aborts(make_embeddings, tmp_path):
    for bad in (np.nan, np.inf):
        vectors = clustered(30)
        vectors[17, 2] = bad
        with pytest.raises(UserError, match="the vector of chunk 17 is not finite"):
            build_index(make_embeddings([vectors]), tmp_path / "index")


def test_bad_queries_are_refused(small):
    index = Index.load(small[0])
    query = np.zeros((3, 16), np.float32)
    for bad in (np.nan, np.inf):
        query[1, 5] = bad
        with pytest.raises(UserError, match="query 1 is not finite"):
            index.search(query, 2)
    with pytest.raises(UserError, match=r"\(3, 15\), the index takes \[q, 16\]"):
        index.search(query[:, :15], 2)
    with pytest.raises(UserError, match="the index takes"):
        index.search(query[0], 2)
    with pytest.raises(UserError, match="k must be at least 1"):
        index.search(np.zeros((1, 16)), 0)
    ids, distances = index.search(query[:0], 2)
    assert ids.shape == distances.shape == (0, 2)


def test_brute_force_answers_alike_whatever_is_asked_with_it(small):
    directory, vectors = small
    index = Index.load(directory)
    queries = np.concatenate([vectors[4:39], clustered(20, seed=5) + 3])
    ids, distances = index.search(queries, 6)
    assert (distances[:35, 0] == 0).all()
    for size in (1, 2, 7):
        for start in range(0, len(queries), size):
            some_ids, some_distances = index.search(queries[start : start + size], 6)
            np.testing.assert_array_equal(some_ids, ids[start : start + size])
            np.testing.assert_array_equal(some_distances, distances[start : start + size])


def test_the_same_question_has_the_same_answer(tree):
    """A tree's candidates depend on the batch a query stands in (ScaNN), but not on when or where it is asked."""
    directory, vectors = tree
    first = Index.load(directory).search(vectors[:300], 6)
    for again in (Index.load(directory).search(vectors[:300], 6) for _ in range(2)):
        for ours, theirs in zip(again, first, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_float64_and_strided_queries_are_taken(small):
    directory, vectors = small
    index = Index.load(directory)
    expected = index.search(vectors[:6:2], 3)
    for queries in (vectors.astype(np.float64)[:6:2], np.asfortranarray(vectors[:6:2])):
        np.testing.assert_array_equal(index.search(queries, 3)[0], expected[0])


def test_one_vector_is_an_index(make_embeddings, tmp_path):
    build_index(make_embeddings([np.ones((1, 4))]), tmp_path / "one")
    ids, distances = Index.load(tmp_path / "one").search(np.zeros((2, 4)), 2)
    assert ids.tolist() == [[0, -1], [0, -1]] and distances.tolist() == [[4, np.inf], [4, np.inf]]


def test_nothing_to_index_is_said(make_embeddings, tmp_path):
    with pytest.raises(UserError, match="no chunk has a vector"):
        build_index(make_embeddings([np.zeros((5, 4))]), tmp_path / "none")


@pytest.mark.parametrize("fixture", ["small", "tree"])
def test_a_moved_directory_answers_the_same(request, fixture, tmp_path):
    directory, vectors = request.getfixturevalue(fixture)
    expected = Index.load(directory).search(vectors[:9], 4)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(copy, moved)
    for ours, theirs in zip(Index.load(moved).search(vectors[:9], 4), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for file in moved.rglob("*"):
        assert file.is_dir() or str(directory).encode() not in file.read_bytes()


@pytest.mark.parametrize("fixture", ["small", "tree"])
def test_a_flipped_byte_or_lost_end_of_any_file_is_found(request, fixture, tmp_path):
    directory, _ = request.getfixturevalue(fixture)
    names = [shard.name for shard in Index.load(directory).manifest.shards]
    assert len(names) >= 4
    for name in names:
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy)
        file = copy / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: checksum differs"):
            Index.load(copy)
        file.write_bytes(data[:-1])
        with pytest.raises(UserError, match=f"{name}: {len(data) - 1} bytes"):
            Index.load(copy)
        file.unlink()
        with pytest.raises(UserError, match=f"{name}: shard is missing"):
            Index.load(copy)
        shutil.rmtree(copy)


def test_no_pickle_is_written_and_a_foreign_one_is_refused(small, tmp_path):
    directory, _ = small
    assert not list(directory.rglob("*.pkl"))
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "shard-00000-of-00001" / "scann" / "scann_docids.pkl").write_bytes(
        b"cos\nsystem\n(S'false'\ntR."
    )
    with pytest.raises(UserError, match=r"scann_docids\.pkl: not part of the index"):
        Index.load(tmp_path / "copy", verify=False)


def test_building_again_is_free_and_other_settings_are_refused(make_embeddings, tmp_path):
    embeddings = make_embeddings([clustered(100)])
    first = build_index(embeddings, tmp_path / "index")
    assert build_index(embeddings, tmp_path / "index") == first
    with pytest.raises(UserError, match=r"settings\.index\.kind = auto, now it is tree"):
        build_index(embeddings, tmp_path / "index", IndexSettings(kind="tree"))


def test_an_interrupted_build_is_made_again_whole(make_embeddings, tmp_path, monkeypatch):
    embeddings = make_embeddings([clustered(100)])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retro_jax.retrieval.index_build._recall", stop)
        with pytest.raises(KeyboardInterrupt):
            build_index(embeddings, tmp_path / "index", IndexSettings(kind="tree"))
    with pytest.raises(UserError, match="begun and not finished"):
        Index.load(tmp_path / "index")
    # What a process killed while ScaNN writes leaves behind.
    (tmp_path / "index" / "shard-00000-of-00001" / "shard.json.done.json").unlink()
    (tmp_path / "index" / ".tmp-1-shard-00000-of-00001" / ".tmp-scann").mkdir(parents=True)
    (tmp_path / "index" / ".tmp-1-shard-00000-of-00001" / ".tmp-scann" / "dataset.npy").write_bytes(b"half")
    build_index(embeddings, tmp_path / "index", IndexSettings(kind="tree"))
    assert Index.load(tmp_path / "index").search(clustered(100)[:1], 1)[0].tolist() == [[0]]
    assert not list((tmp_path / "index").glob(".tmp*"))


def test_the_fingerprint_is_of_this_build(make_embeddings, tmp_path):
    """Two builds of the same data differ in ScaNN; whoever searched one must be able to tell."""
    embeddings = make_embeddings([clustered(300)])
    manifests = [build_index(embeddings, tmp_path / str(i), IndexSettings(kind="tree")) for i in range(2)]
    same = [a.sha256 for a in manifests[0].shards] == [b.sha256 for b in manifests[1].shards]
    assert (manifests[0].fingerprint == manifests[1].fingerprint) == same


@pytest.mark.parametrize("imported_before", [False, True])
def test_a_tensorflow_of_another_version_is_in_nobodys_way(small, tmp_path, imported_before):
    """ScaNN's TensorFlow operations would not load beside it ("undefined symbol"); they are never asked for."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text(
        textwrap.dedent("""
        loaded = True
        def load_op_library(path):
            raise RuntimeError("undefined symbol: _ZN10tensorflow")
        """)
    )
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
if {imported_before}:
    import tensorflow
import numpy as np
from retro_jax.retrieval.index import Index
print(Index.load({str(small[0])!r}).search(np.zeros((1, 16)), 2)[0].shape)
assert ("tensorflow" in sys.modules) == {imported_before}
import tensorflow
assert tensorflow.loaded
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "(1, 2)", result.stderr


def test_without_scann_the_message_says_what_to_install(small, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "scann"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(UserError, match=r"needs ScaNN: pip install 'retro_jax\[data\]'"):
        Index.load(small[0])
