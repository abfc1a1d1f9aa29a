"""Exact search is exact: equal to a brute-force loop, for any size, with ties by id."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.errors import UserError
from retro_jax.retrieval import exact
from retro_jax.retrieval.exact import exact_search, recall


def brute_force(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(queries), k), -1)
    distances = np.full((len(queries), k), np.inf)
    for i, query in enumerate(queries):
        squares = ((database.astype(np.float64) - query) ** 2).sum(1)
        order = sorted(range(len(database)), key=lambda j: (squares[j], j))[:k]
        ids[i, : len(order)], distances[i, : len(order)] = order, squares[order]
    return ids, distances


@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(0, 40), st.integers(1, 12), st.booleans())
@settings(deadline=None, max_examples=40)
def test_equals_brute_force(seed, num_queries, size, k, whole_numbers):
    rng = np.random.default_rng(seed)
    # Small whole numbers make many ties, which float32 computes exactly.
    draw = (lambda n: rng.integers(-1, 2, (n, 3))) if whole_numbers else (lambda n: rng.normal(size=(n, 3)))
    queries, database = draw(num_queries).astype(np.float32), draw(size).astype(np.float32)
    ids, distances = exact_search(queries, database, k)
    expected_ids, expected_distances = brute_force(queries, database, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-5)


def test_many_blocks_equal_one(monkeypatch):
    rng = np.random.default_rng(0)
    database, queries = rng.normal(size=(101, 8)).astype(np.float32), rng.normal(size=(23, 8)).astype(np.float32)
    whole = exact_search(queries, database, 7)
    monkeypatch.setattr(exact, "_DATABASE_ROWS", 16)
    monkeypatch.setattr(exact, "_QUERY_ROWS", 4)
    for one, many in zip(whole, exact_search(queries, database, 7), strict=True):
        np.testing.assert_array_equal(one, many)


def test_of_equally_near_vectors_the_first_are_taken(monkeypatch):
    monkeypatch.setattr(exact, "_DATABASE_ROWS", 64)
    database = np.ones((200, 3), np.float32)
    ids, _ = exact_search(np.zeros((2, 3)), database, 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_the_distance_to_itself_is_zero_far_from_the_origin():
    database = (1000 + np.random.default_rng(2).normal(size=(50, 4))).astype(np.float32)
    ids, distances = exact_search(database, database, 1)
    assert (distances == 0).all() and ids[:, 0].tolist() == list(range(50))


def test_what_is_not_finite_is_refused():
    database = np.ones((9, 3), np.float32)
    with pytest.raises(UserError, match="query"):
        exact_search(np.array([[1, np.nan, 0]]), database, 1)
    database[4, 1] = np.inf
    with pytest.raises(UserError, match="database vector 4"):
        exact_search(np.ones((1, 3)), database, 1)
    with pytest.raises(UserError, match="k must be"):
        exact_search(np.ones((1, 3)), database[:2], 0)


def test_recall_counts_found_neighbours_and_forgives_ties():
    database = np.array([[0.0], [1], [1], [2], [9]], np.float32)
    queries = np.zeros((1, 1), np.float32)
    _, distances = exact_search(queries, database, 2)
    assert recall(np.array([[0, 1]]), distances, queries, database) == 1
    assert recall(np.array([[0, 2]]), distances, queries, database) == 1  # as near as chunk 1
    assert recall(np.array([[0, 4]]), distances, queries, database) == 0.5
    assert recall(np.array([[-1, -1]]), distances, queries, database) == 0
