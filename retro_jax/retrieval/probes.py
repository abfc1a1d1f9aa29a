"""Probes: a sample of a database's own vectors with their true neighbours, by which recall is measured and watched.

Every shard of an index answers the probes twice while its vectors are in memory, exactly and by its index, and keeps
the answers. Merged over the shards they give the recall of the whole index. A probe leaves itself out, as a search of
neighbours does; equally near vectors count alike.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.scann_shard import ScannShard

DEPTHS = (2, 10)  # recall@2 and @10
_DEPTH = max(DEPTHS) + 1  # one is the probe itself
_TOLERANCE = (1 + 1e-6, 1e-12)
_MARGIN = 0.005  # a sample's recall differs a little from that of all queries
_STEP = 1.25

ANSWERS = np.dtype(
    [
        ("exact_ids", "<i8", (_DEPTH,)),  # chunk ids, nearest first, -1 for none
        ("exact", "<f4", (_DEPTH,)),  # their squared distances, +inf for none
        ("found_ids", "<i8", (_DEPTH,)),  # what the index answers
        ("reported", "<f4", (_DEPTH,)),  # the distances it gives
        ("found", "<f4", (_DEPTH,)),  # the true ones
    ]
)


def probe_dtype(dimension: int) -> np.dtype:
    """A probe: the chunk it is and its vector."""
    return np.dtype([("id", "<i8"), ("vector", "<f4", (dimension,))])


def draw_probes(embeddings: Any, count: int, seed: int) -> np.ndarray:
    """Up to `count` chunks with a vector, in order of id, as an array of `probe_dtype`.

    Raises:
      UserError: a vector of them is not finite.
    """
    total = len(embeddings)
    chosen = np.random.default_rng(seed).choice(total, min(total, 4 * count + 64), replace=False)
    vectors = embeddings.vectors(chosen)
    require_finite(vectors, chosen, embeddings.directory)
    keep = np.flatnonzero(vectors.any(1))[:count]
    keep = keep[np.argsort(chosen[keep])]
    probes = np.empty(len(keep), probe_dtype(embeddings.dimension))
    probes["id"], probes["vector"] = chosen[keep], vectors[keep]
    return probes


def require_finite(vectors: np.ndarray, ids: np.ndarray, place: Any) -> None:
    """Refuses vectors that would make ScaNN abort the process.

    Raises:
      UserError: naming the first chunk.
    """
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise UserError(f"{place}: the vector of chunk {ids[~finite].min()} is not finite; embed it again")


def exact_answers(probes: np.ndarray, vectors: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`ANSWERS` [P] of one shard with the exact part filled in and nothing found.

    Args:
      probes: of `probe_dtype`.
      vectors: [n, E] of the shard; n may be 0.
      ids: [n] their chunk ids.
    """
    answers = np.empty(len(probes), ANSWERS)
    for name in ("exact_ids", "found_ids"):
        answers[name] = -1
    for name in ("exact", "reported", "found"):
        answers[name] = np.inf
    if len(ids):
        rows, answers["exact"] = exact_search(probes["vector"], vectors, _DEPTH)
        answers["exact_ids"] = np.where(rows >= 0, ids[rows], -1)
    return answers


def ask(searcher: ScannShard, probes: np.ndarray, vectors: np.ndarray, ids: np.ndarray, answers: np.ndarray) -> None:
    """Fills in what a shard's index finds."""
    depth = min(_DEPTH, searcher.size)
    queries = np.ascontiguousarray(probes["vector"])
    rows, reported = searcher.search(queries, depth)
    order = np.lexsort((rows, reported), axis=1)
    rows, reported = np.take_along_axis(rows, order, 1), np.take_along_axis(reported, order, 1)
    true = np.square(vectors[rows].astype(np.float64) - queries[:, None]).sum(2)
    answers["found_ids"][:, :depth] = np.where(rows >= 0, ids[rows], -1)
    answers["reported"][:, :depth] = reported
    answers["found"][:, :depth] = np.where(rows >= 0, true, np.inf)


def recall_at(k: int, probes: np.ndarray, answers: np.ndarray) -> float:
    """Share of the true k nearest neighbours of the probes, themselves left out, that were found."""
    own = np.asarray(probes["id"])[:, None]
    exact = _first(answers["exact_ids"], answers["exact"], own, k)
    found = _first(answers["found_ids"], answers["found"], own, k)
    possible = np.isfinite(exact).sum(1)
    limits = np.max(np.where(np.isfinite(exact), exact, -1), axis=1)
    hits = (found <= limits[:, None] * _TOLERANCE[0] + _TOLERANCE[1]).sum(1)
    return float(np.minimum(hits, possible).sum() / possible.sum()) if possible.any() else 1.0


def measure(
    searcher: ScannShard,
    probes: np.ndarray,
    vectors: np.ndarray,
    ids: np.ndarray,
    answers: np.ndarray,
    asked: IndexSettings,
    min_recall: float,
) -> None:
    """Fills in what a shard's index finds, after `searcher.settings` were given what was left to measurement.

    Leaves are added until the shard reaches the wanted recall@2, and a little more for the error of a sample; when a
    quarter of them does not, twice as many candidates are rescored, and so on; the last try goes to all leaves.

    Args:
      searcher: of the shard.
      probes: of `probe_dtype`.
      vectors, ids: of the shard.
      answers: with the exact part.
      asked: what is named there, leaves to search or candidates, is left as it is.
      min_recall: wanted.
    """
    for settings in _attempts(searcher.settings, asked):
        searcher.settings = settings
        ask(searcher, probes, vectors, ids, answers)
        if recall_at(2, probes, answers) >= min(1.0, min_recall + _MARGIN):
            return


def _attempts(settings: IndexSettings, asked: IndexSettings) -> Iterator[IndexSettings]:
    """What a shard is searched with, from little work to much."""
    if settings.kind == "brute_force":
        yield settings
        return
    depths = [settings.reorder * (1 if asked.reorder else 2**step) for step in range(1 if asked.reorder else 5)]
    for depth in depths:
        leaves = asked.leaves_to_search or max(1, settings.num_leaves // 200)
        while True:
            yield dataclasses.replace(settings, leaves_to_search=min(leaves, settings.num_leaves), reorder=depth)
            enough = settings.num_leaves if depth == depths[-1] else settings.num_leaves // 4
            if asked.leaves_to_search or leaves >= enough:
                break
            leaves = min(settings.num_leaves, max(leaves + 1, round(leaves * _STEP)))


def merged(shards: Sequence[np.ndarray], visits: np.ndarray | None = None) -> np.ndarray:
    """The `ANSWERS` of an index from those of its shards.

    Args:
      shards: [S] arrays [P].
      visits: bool [P, S], the shards whose index a probe asks; None: all.
    """
    together = np.empty(len(shards[0]), ANSWERS)
    exact = np.concatenate([shard["exact"] for shard in shards], axis=1)
    exact_ids = np.concatenate([shard["exact_ids"] for shard in shards], axis=1)
    order = np.lexsort((exact_ids, exact), axis=1)[:, :_DEPTH]
    for name, values in (("exact", exact), ("exact_ids", exact_ids)):
        together[name] = np.take_along_axis(values, order, 1)
    parts = {name: [shard[name] for shard in shards] for name in ("found_ids", "reported", "found")}
    if visits is not None:
        for number in range(len(shards)):
            seen = visits[:, number, None]
            parts["found_ids"][number] = np.where(seen, parts["found_ids"][number], -1)
            for name in ("reported", "found"):
                parts[name][number] = np.where(seen, parts[name][number], np.inf)
    values = {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}
    order = np.lexsort((values["found_ids"], values["reported"]), axis=1)[:, :_DEPTH]
    for name, array in values.items():
        together[name] = np.take_along_axis(array, order, 1)
    return together


def _first(ids: np.ndarray, distances: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """Distances [P, k] of the first k that are there and are not the probe itself, +inf where there are fewer."""
    distances = np.where((ids != own) & (ids >= 0), distances, np.inf)
    order = np.argsort((ids == own) | (ids < 0), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1)
