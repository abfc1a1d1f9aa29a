"""The benchmark of search: its best point is the quickest that has the recall."""

import sys

import numpy as np
import pytest
from small_run import ROOT, run_program

from retro_jax.errors import UserError
from retro_jax.retrieval.exact import exact_search

sys.path.insert(0, str(ROOT / "tools"))
from benchmarks import retrieval, retrieval_plot, search_measure


def unit(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    vectors = 2 * rng.normal(size=(40, 16))[rng.integers(0, 40, n)] + rng.normal(size=(n, 16))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def point(recall: float, rate: float) -> dict:
    return {"setting": [recall, rate], "recall": recall, "queries_per_second": rate}


def test_a_curve_ends_where_nothing_is_left_to_find():
    vectors, queries = unit(300), unit(20, seed=1)
    _, squares = exact_search(queries, vectors, 2)

    def search(block, setting):
        return exact_search(block, vectors[:setting], 2)[0]

    points = search_measure.curve(search, [100, 200, 300, 400], vectors, queries, squares, seconds=0.01, start=0.5)
    assert [each["setting"] for each in points] == [200, 300]
    assert points[-1]["recall"] == 1 > points[0]["recall"] >= 0.5
    assert all(each["queries_per_second"] > 0 for each in points)


def test_the_best_point_is_the_quickest_that_has_the_recall():
    points = [point(0.9, 900), point(0.96, 300), point(0.95, 400), point(0.99, 100)]
    assert retrieval.best(points, 0.95)["best"] == point(0.95, 400)
    assert retrieval.best(points, 0.999)["best"] is None
    assert retrieval_plot.frontier([*points, point(0.94, 350)]) == [(0.9, 900), (0.95, 400), (0.96, 300), (0.99, 100)]


def test_our_line_and_the_comparison_without_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval, "QUERIES", 64)
    settings = {"kind": "tree", "num_leaves": 40, "reorder": 32}
    ours, comparison = retrieval.search_lines(unit(2500), [2000], peers=(), settings=settings, seconds=0.01, turns=2)
    assert ours["engine"] == "retro_jax" and ours["vectors"] == 2000 and ours["best"]["recall"] >= 0.95
    assert ours["synthetic_vectors"] == 0
    assert ours["build_seconds"] > 0 and 16 * 2 < ours["bytes_per_vector"] < 400
    assert all(each["queries_per_second"] >= each["queries_per_second_median"] > 0 for each in ours["points"])
    assert comparison["best_peer"] is None and comparison["ratio_to_best_peer"] is None
    assert comparison["queries_per_second"] == {"retro_jax": ours["best"]["queries_per_second"]}
    retrieval_plot.plot_recall([ours, comparison], tmp_path / "plot.png")
    retrieval_plot.plot_growth([ours, comparison], tmp_path / "growth.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("plot.png", "growth.png"))


def test_vectors_are_made_between_real_ones():
    real = unit(300)
    rows = retrieval.between(real, 500)
    assert rows[:300].tobytes() == real.tobytes()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    # Near to where it starts, and never a copy.
    nearest = (rows[300:] @ real.T).max(1)
    assert nearest.min() > 0.5 and np.median(nearest) < 0.999


def test_vectors_that_are_made_are_counted(monkeypatch):
    monkeypatch.setattr(retrieval, "QUERIES", 64)
    options = {"settings": {"kind": "tree", "num_leaves": 20, "reorder": 32}, "seconds": 0.01, "turns": 1}
    ours, _ = retrieval.search_lines(unit(1064), [1200], peers=(), synthetic=True, **options)
    assert ours["vectors"] == 1200 and ours["synthetic_vectors"] == 200 and ours["best"]["recall"] >= 0.95


def test_what_cannot_be_measured_is_said(tmp_path):
    with pytest.raises(UserError, match="100 vectors are too few for 2,000 and 2,048 queries"):
        next(retrieval.search_lines(unit(100), [2000]))
    with pytest.raises(UserError, match="no such program"):
        retrieval.environment(str(tmp_path / "python"))
    with pytest.raises(UserError, match="lacks what the peer needs"):
        retrieval.environment(sys.executable)


@pytest.mark.parametrize("benchmark", ["retrieval", "growth"])
def test_the_folder_of_plots_is_there_before_anything_is_measured(tmp_path, benchmark):
    flags = (f"--embeddings={tmp_path / 'absent'}", f"--plots={tmp_path / 'plots' / 'here'}")
    status, _, stderr = run_program("tools/benchmark.py", benchmark, *flags)
    assert status == 1 and "absent: no such directory" in stderr and (tmp_path / "plots" / "here").is_dir()


@pytest.mark.slow
def test_every_peer_answers_the_same_queries(monkeypatch):
    """Makes the peers' environment, so it needs a package index and a C++ compiler."""
    monkeypatch.setattr(retrieval, "QUERIES", 64)
    lines = list(
        retrieval.search_lines(unit(2500), [2000], settings={"kind": "tree", "num_leaves": 40}, seconds=0.01, turns=1)
    )
    assert [line["engine"] for line in lines] == ["retro_jax", *retrieval.PEERS, "comparison"]
    assert all(line["points"] and line["bytes_per_vector"] > 0 for line in lines[:-1])
    assert [line["best"]["recall"] for line in lines if line["engine"] == "faiss_exact"] == [1]
    assert lines[-1]["ratio_to_best_peer"] > 0
