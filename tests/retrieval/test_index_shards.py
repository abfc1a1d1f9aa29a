"""An index in shards answers as the whole would, whichever are loaded; its recall is measured and has a floor."""

import json
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.data.distribute import BeamOptions
from retro_jax.data.stage import shard_name
from retro_jax.errors import UserError
from retro_jax.retrieval import index_build, router
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.index import Index, merge
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.scann_shard import ScannShard

SHARDS = 4


def clustered(n: int, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (2 * rng.normal(size=(20, width))[rng.integers(0, 20, n)] + rng.normal(size=(n, width))).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    made = clustered(900)
    made[[3, 40, 899]] = 0
    made[500:520] = made[10:30]  # equally near ones, in other shards
    return made


@pytest.fixture(scope="module")
def embeddings(vectors, make_embeddings):
    return make_embeddings([vectors[:250], vectors[250:300], vectors[300:]])


@pytest.fixture(scope="module")
def ranges(embeddings, tmp_path_factory):
    """An index in 4 ranges of chunks."""
    directory = tmp_path_factory.mktemp("index") / "ranges"
    build_index(embeddings, directory, num_shards=SHARDS)
    return directory


@pytest.fixture(scope="module")
def cells(embeddings, tmp_path_factory):
    """An index in 4 shards made of 24 cells."""
    directory = tmp_path_factory.mktemp("index") / "cells"
    build_index(embeddings, directory, num_shards=SHARDS, cells=24)
    return directory


@given(st.integers(0, 10**6), st.integers(1, 950))
@settings(deadline=None, max_examples=25)
def test_shards_merge_to_the_answer_of_the_whole(ranges, vectors, seed, k):
    index = Index.load(ranges, verify=False)
    queries = clustered(4, seed=seed)
    queries[0] = vectors[15]
    real = np.flatnonzero(vectors.any(1))
    ids, distances = index.search(queries, k)
    expected, squares = exact_search(queries, vectors[real], k)
    expected = np.where(expected >= 0, real[expected], -1)
    np.testing.assert_allclose(distances, squares, rtol=1e-5, atol=1e-6)
    # Equal distances are in order of id, whatever shards they come from.
    for row, other, near in zip(ids, expected, distances, strict=True):
        np.testing.assert_array_equal(row, row[np.lexsort((row, near))])
        assert set(row.tolist()) == set(other.tolist()) or (np.diff(near) < 1e-6).any()


@pytest.mark.parametrize("fixture", ["ranges", "cells"])
def test_shards_loaded_apart_give_together_what_all_give(request, fixture):
    directory = request.getfixturevalue(fixture)
    whole = Index.load(directory)
    queries = clustered(50, seed=7)
    parts = [Index.load(directory, shards=chosen) for chosen in ([0, 2], [1], [3])]
    assert [part.shards for part in parts] == [(0, 2), (1,), (3,)] and whole.num_shards == SHARDS
    assert sum(part.size for part in parts) == whole.size == 897
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    for k in (1, 3, 40):
        together = merge([part.search(queries, k) for part in parts], k)
        for ours, theirs in zip(together, whole.search(queries, k), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    nothing = Index.load(directory, shards=())
    assert nothing.size == 0 and (nothing.search(queries, 2)[0] == -1).all()
    with pytest.raises(UserError, match="has shards 0 to 3"):
        Index.load(directory, shards=[4])


def test_a_query_that_visits_few_shards_misses_little_and_never_lacks_neighbours(cells, vectors):
    index = Index.load(cells)
    counts = index.manifest.counts
    assert counts["recall_at_2"] >= 0.95 and 1 <= counts["shards_visited"] < SHARDS
    assert counts["routing"][-1]["cells"] == counts["cells_to_visit"] == index.router.cells_to_visit
    assert counts["recall_at_2_of_all_shards"] == 1
    found = [step["recall_at_2"] for step in counts["routing"]]
    assert found == sorted(found)
    for k in (600, 897, 1000):
        ids, _ = index.search(vectors[5:7], k)
        assert ((ids >= 0).sum(1) == min(k, 897)).all()
    sizes = np.array(counts["shard_vectors"])
    assert sizes.sum() == 897 and sizes.max() < 1.7 * sizes.mean()


def test_stored_recall_is_that_of_searching(cells, vectors):
    index = Index.load(cells)
    probes = np.load(cells / "probes.npy")
    found, _ = index.search(np.ascontiguousarray(probes["vector"]), 11)
    exact, squares = exact_search(probes["vector"], vectors, 11)
    hits = 0
    for own, mine, true, near in zip(probes["id"], found, exact, squares, strict=True):
        limit = near[true != own][1]
        two = mine[mine != own][:2]
        hits += (np.square(vectors[two] - vectors[own]).sum(1) <= limit * 1.000001).sum()
    assert hits / (2 * len(probes)) == pytest.approx(index.manifest.counts["recall_at_2"], abs=1e-3)


def test_too_little_recall_fails_with_advice_and_keeps_what_is_built(embeddings, tmp_path):
    poor = IndexSettings(kind="tree", num_leaves=40, leaves_to_search=1, reorder=4)
    with pytest.raises(UserError, match=r"recall@2 is 0\.\d+, the floor is 0\.95: search more leaves") as failure:
        build_index(embeddings, tmp_path / "index", poor, num_shards=2)
    with pytest.raises(UserError, match="begun and not finished"):
        Index.load(tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("shard.json")}
    assert len(before) == 2
    accepted = float(str(failure.value).partition("--min_recall=")[2][:4])
    counts = build_index(embeddings, tmp_path / "index", poor, num_shards=2, min_recall=accepted).counts
    assert accepted <= counts["recall_at_2"] < 0.95 and counts["min_recall"] == accepted
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("shard.json")}


def test_leaves_to_search_are_as_few_as_reach_the_recall(embeddings, tmp_path):
    chosen = {}
    for goal in (0.6, 0.99):
        settings = IndexSettings(kind="tree", num_leaves=60, reorder=300)
        manifest = build_index(embeddings, tmp_path / str(goal), settings, min_recall=goal)
        assert manifest.counts["recall_at_2"] >= goal
        folder = tmp_path / str(goal) / "shard-00000-of-00001"
        chosen[goal] = json.loads((folder / "shard.json").read_text())["settings"]["leaves_to_search"]
    assert chosen[0.6] < chosen[0.99] <= 60


def test_more_candidates_are_rescored_where_leaves_do_not_help(make_embeddings, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)  # codes are poor on mere noise
    embeddings = make_embeddings([vectors])
    chosen = {}
    for reorder, goal in ((None, 0.9), (24, 0.0)):
        directory = tmp_path / str(reorder)
        asked = IndexSettings(kind="tree", num_leaves=30, dimensions_per_block=4, reorder=reorder)
        assert build_index(embeddings, directory, asked, min_recall=goal).counts["recall_at_2"] >= goal
        folder = directory / "shard-00000-of-00001"
        chosen[reorder] = json.loads((folder / "shard.json").read_text())["settings"]["reorder"]
    assert chosen[None] > 24 and chosen[24] == 24


def test_vectors_of_length_one_are_searched_by_inner_product_and_answered_in_l2(make_embeddings, tmp_path):
    vectors = clustered(1500)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for spill, rescore, tolerance in ((0.0, "float32", 1e-5), (1.0, "bfloat16", 2e-2)):
        settings = IndexSettings(kind="tree", spill=spill, rescore=rescore, reorder=200)
        embeddings = make_embeddings([vectors], embedder_settings={"normalize": True})
        directory = tmp_path / rescore
        build_index(embeddings, directory, settings, min_recall=0.9)
        index = Index.load(directory)
        queries = clustered(20, seed=3)  # of any length
        ids, distances = index.search(queries, 1600)
        assert (np.sort(ids, axis=1)[:, 100:] == np.arange(1500)).all()
        true = np.square(vectors[ids[:, :1500]] - queries[:, None]).sum(2)
        np.testing.assert_allclose(distances[:, :1500], true, rtol=tolerance, atol=tolerance)
        assert np.isinf(distances[:, 1500:]).all()
    vectors[700] *= 2
    with pytest.raises(UserError, match="the vector of chunk 700 has not length 1"):
        build_index(make_embeddings([vectors], embedder_settings={"normalize": True}), tmp_path / "wrong")


def test_only_what_is_loaded_is_verified(ranges, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ranges, copy)
    file = copy / "shard-00002-of-00004" / "ids.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00002-of-00004/ids\.npy: checksum differs"):
        Index.load(copy)
    assert Index.load(copy, shards=[0, 1, 3]).size < 897
    shutil.rmtree(copy / "shard-00001-of-00004")
    assert Index.load(copy, shards=[0, 3]).shards == (0, 3)
    with pytest.raises(UserError, match=r"shard-00001-of-00004/.*: shard is missing"):
        Index.load(copy, shards=[0, 1])


def test_a_shard_of_another_build_is_found(embeddings, ranges, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ranges, copy)
    build_index(embeddings, tmp_path / "other", num_shards=SHARDS, seed=5)
    shutil.copy(tmp_path / "other" / "shard-00001-of-00004" / "probes.npy", copy / "shard-00001-of-00004")
    with pytest.raises(UserError, match="checksum differs"):
        Index.load(copy)


@pytest.mark.parametrize("options", [BeamOptions(), BeamOptions(workers=2)], ids=["here", "two processes"])
def test_a_build_goes_on_with_the_shards_that_lack(embeddings, ranges, tmp_path, monkeypatch, options):
    directory = tmp_path / "index"

    def stop(*_):
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(index_build, "_recall", stop)
        with pytest.raises(UserError, match="stopped"):
            build_index(embeddings, directory, num_shards=SHARDS)
    shutil.rmtree(directory / "shard-00001-of-00004")
    kept = directory / "shard-00002-of-00004" / "shard.json"
    before = kept.stat().st_mtime_ns
    build_index(embeddings, directory, num_shards=SHARDS, options=options)
    assert kept.stat().st_mtime_ns == before
    queries = clustered(9, seed=2)
    np.testing.assert_array_equal(Index.load(directory).search(queries, 5)[0], Index.load(ranges).search(queries, 5)[0])


def test_a_shard_that_two_workers_build_at_a_time_is_of_one_build(embeddings, vectors, tmp_path, monkeypatch):
    """The second begins and ends while the first has written half of its files."""
    build, save, builds = index_build.build_shard, ScannShard.save, []

    def saved(self, folder):
        files = save(self, folder)
        builds.append(self.settings.num_leaves)
        if len(builds) == 1:
            asked = {**arguments, "settings": {**arguments["settings"], "num_leaves": 30}}
            build(writer, asked)
        return files

    def twice(*given):
        nonlocal writer, arguments
        writer, arguments = given
        build(writer, arguments)

    writer = arguments = None
    monkeypatch.setattr(ScannShard, "save", saved)
    monkeypatch.setattr(index_build, "build_shard", twice)
    twice.__module__, twice.__qualname__ = index_build.__name__, "build_shard"
    build_index(embeddings, tmp_path / "index", IndexSettings(kind="tree", num_leaves=20, leaves_to_search=20))
    assert builds == [20, 30]
    folder = tmp_path / "index" / "shard-00000-of-00001"
    assert json.loads((folder / "shard.json").read_text())["settings"]["num_leaves"] == 30
    assert not list((tmp_path / "index").glob(".tmp*"))
    index = Index.load(tmp_path / "index")  # with the checksums
    np.testing.assert_array_equal(index.search(vectors[700:705], 1)[0][:, 0], np.arange(700, 705))


def test_a_shard_of_cells_reads_the_cells_file_by_file(tmp_path):
    """Memory is that of a file and of the shard, not of the database."""
    files, rows, shards = 40, 50_000, 50
    rng = np.random.default_rng(0)
    (tmp_path / "cells").mkdir()
    (tmp_path / "router").mkdir()
    np.save(tmp_path / "router" / "shard_of_cell.npy", np.arange(shards, dtype=np.int32))
    expected = []
    for i in range(files):
        cells = rng.integers(-1, shards, rows).astype(np.int32)
        np.save(tmp_path / "cells" / shard_name("cells", i, files, ".npy"), cells)
        expected += (i * rows + np.flatnonzero(cells == 7)).tolist()
    offsets = np.arange(files + 1) * rows
    embeddings = SimpleNamespace(
        shard_offsets=offsets, dimension=1, directory=tmp_path, vectors=lambda ids: ids[:, None] + 1.0
    )
    tracemalloc.start()
    ids, found = index_build._vectors_of_shard(tmp_path, embeddings, {"range": None, "number": 7, "unit": False})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert ids.tolist() == expected and (found[:, 0] == ids + 1).all()
    assert peak < 4 * files * rows  # of all cells, once


def test_chunks_are_in_the_same_cells_however_many_are_assigned_at_once(embeddings, cells, tmp_path, monkeypatch):
    taken = []

    def recorded(vectors, centroids):
        taken.append(len(vectors))
        return router.squared_to_cells(vectors, centroids)

    monkeypatch.setattr(router, "_DISTANCES_AT_ONCE", 24 * 100)
    monkeypatch.setattr(index_build, "squared_to_cells", recorded)
    build_index(embeddings, tmp_path / "parts", num_shards=SHARDS, cells=24)
    assert sorted(taken) == [50, 50, *[100] * 8]
    files = sorted((cells / "cells").iterdir())
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "parts" / "cells" / file.name).read_bytes() == file.read_bytes()


def test_an_index_of_an_older_program_is_named(ranges, tmp_path):
    shutil.copytree(ranges, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["settings"]["layout"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="built by an older program"):
        Index.load(tmp_path / "old")


def test_what_cannot_be_sharded_is_refused(embeddings, tmp_path):
    with pytest.raises(UserError, match="3 cells cannot make 4 shards"):
        build_index(embeddings, tmp_path / "i", num_shards=4, cells=3)
    with pytest.raises(UserError, match="898 shards are too many for 897 vectors"):
        build_index(embeddings, tmp_path / "i", num_shards=898)
    for cells, visited in ((24, 100), (24, 0), (0, 3)):
        with pytest.raises(UserError, match=f"between 1 and the number of cells, {cells}; is {visited}"):
            build_index(embeddings, tmp_path / "i", num_shards=4, cells=cells, cells_to_visit=visited)
    with pytest.raises(UserError, match="min_recall must be between 0 and 1"):
        build_index(embeddings, tmp_path / "i", min_recall=95)
    assert not (tmp_path / "i").exists()
