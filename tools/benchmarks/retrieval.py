"""Search beside its peers: queries a second against recall, build time and bytes a vector, on the same vectors.

Our index stands beside FAISS (inverted lists with 4-bit codes and exact refinement, flat lists, a graph, exact search)
and hnswlib, which live in an environment of their own, made on first use. Every engine builds with all cores, in a
process of its own, and answers batches of 1,024 queries with `cores` of them. The engines take turns, so that a machine
that others use too is as busy for one as for another; the best of the turns counts. Queries are chunks that are not in
the index.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import children, environments, search_measure
from retro_jax.errors import UserError
from retro_jax.retrieval.exact import exact_search

HOME = environments.CACHE / "search"
PACKAGES = ("numpy==2.4.6", "faiss-cpu==1.15.1", "hnswlib==0.8.0", "packaging==26.3")
IMPORTS = "import faiss, hnswlib, numpy"
PEERS = ("faiss_fast_scan", "faiss_fast_scan_fine", "faiss_flat_lists", "faiss_hnsw", "hnswlib", "faiss_exact")
QUERIES = 2048
GROWTH = (10_000, 31_600, 100_000, 316_000, 1_000_000)
_DEPTHS = (12, 16, 32)
_BLOCK = 65_536  # vectors made at once
_LEAVES_SHARE = (*np.geomspace(0.0025, 0.1, 32), 0.15, 0.2, 0.4, 1.0)


def environment(python: str | None, home: Path = HOME) -> str:
    """The interpreter that has FAISS and hnswlib, as of `environments.environment`."""
    needs = "a package index and a C++ compiler (hnswlib is compiled), or --peer_python, an interpreter that has both"
    return environments.environment("FAISS with hnswlib", python, home, PACKAGES, IMPORTS, needs)


def search_lines(
    vectors: Any,
    sizes: Sequence[int],
    *,
    peers: Sequence[str] = PEERS,
    peer_python: str | None = None,
    settings: dict[str, Any] | None = None,
    goal: float = 0.95,
    k: int = 2,
    cores: int = 1,
    seconds: float = search_measure.SECONDS,
    turns: int = 3,
    synthetic: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measures every engine at every size; a line each, and at the end of a size one that compares them.

    Args:
      vectors: an `EmbeddingSet` or array [N, E]; the queries are taken behind the largest size.
      sizes: vectors in the index.
      peers: of `PEERS`.
      peer_python: see `environment`.
      settings: fields of `IndexSettings` of our index.
      goal: recall@k at which the engines are compared.
      k: neighbours.
      cores: that may search.
      seconds: that a rate is measured over in a turn.
      turns: of every engine.
      synthetic: where there are too few vectors, make more of them, and say so in the lines.

    Raises:
      UserError: too few vectors, or a peer that cannot be installed.
    """
    rows = np.asarray(vectors[0 : min(len(vectors), max(sizes) + 4 * QUERIES)])
    rows = rows[rows.any(1)]
    real = min(len(rows) - QUERIES, max(sizes))
    if real < (QUERIES if synthetic else max(sizes)):
        raise UserError(f"{len(rows):,} vectors are too few for {max(sizes):,} and {QUERIES:,} queries")
    queries = rows[real : real + QUERIES]
    rows = between(rows[:real], max(sizes))
    python = environment(peer_python) if peers else ""
    for size in sizes:
        with tempfile.TemporaryDirectory() as directory:
            job = _write(Path(directory), rows[:size], queries, k) | {"k": k, "cores": cores, "seconds": seconds}
            job |= {"folder": directory, "settings": settings or {}, "unit": _unit(rows)}
            common = {"benchmark": "retrieval", "vectors": size, "dimension": rows.shape[1], "k": k, "cores": cores}
            common["synthetic_vectors"] = max(0, size - real)
            sides = {"retro_jax": (sys.executable, "benchmarks.search_ours", job)}
            for engine in peers:
                sides[engine] = (python, "benchmarks.search_peers", {**job, "engine": engine})
            built = {name: children.run(*side[:2], {**side[2], "do": "build"}) for name, side in sides.items()}
            sides["retro_jax"][2]["sweep"] = _sweep(built["retro_jax"]["num_leaves"] or 1, settings or {})
            found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in sides}
            for _ in range(turns):
                for name, side in sides.items():
                    found[name].append(children.run(*side[:2], {**side[2], "do": "search"})["points"])
            lines = []
            for name in sides:
                points = _over_turns(found[name])
                lines.append({**common, "engine": name, **built[name], **best(points, goal), "points": points})
                yield lines[-1]
            yield {**common, "engine": "comparison", **_compared(lines, goal)}


def best(points: Sequence[dict[str, Any]], goal: float) -> dict[str, Any]:
    """The quickest point that has the recall; None where no point has."""
    enough = [point for point in points if point["recall"] >= goal]
    if not enough:
        return {"recall_goal": goal, "best": None}
    return {"recall_goal": goal, "best": max(enough, key=lambda point: point["queries_per_second"])}


def _sweep(leaves: int, settings: dict[str, Any]) -> list[list[int]]:
    """Leaves to search and candidates to rescore, from little work to much."""
    searched = sorted({max(1, math.ceil(share * leaves)) for share in _LEAVES_SHARE})
    depths = [settings["reorder"]] if settings.get("reorder") else _DEPTHS
    return [[each, depth] for each in searched for depth in depths]


def _over_turns(turns: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The points of every setting that all turns have measured: the best rate and the median."""
    points = []
    for point in turns[0]:
        rates = [each["queries_per_second"] for turn in turns for each in turn if each["setting"] == point["setting"]]
        if len(rates) == len(turns):
            median = statistics.median(rates)
            points.append({**point, "queries_per_second": max(rates), "queries_per_second_median": median})
    return points


def between(real: np.ndarray, count: int) -> np.ndarray:
    """`count` vectors: the real ones, and behind them points on the way from one of them to another.

    They are as dense as text is where two chunks say nearly the same, and lie apart elsewhere; made of random numbers
    they would all be far from every query, and a search through them too easy.
    """
    rows = np.empty((count, real.shape[1]), np.float32)
    rows[: len(real)] = real
    rng = np.random.default_rng(0)
    unit = _unit(real)
    for first in range(len(real), count, _BLOCK):
        block = rows[first : first + _BLOCK]
        begin, end = (real[rng.integers(0, len(real), len(block))] for _ in range(2))
        block[:] = begin + rng.uniform(0.2, 0.5, (len(block), 1)).astype(np.float32) * (end - begin)
        if unit:
            block /= np.linalg.norm(block, axis=1, keepdims=True)
    return rows


def _unit(vectors: np.ndarray) -> bool:
    return bool(np.allclose(np.square(vectors[:1000]).sum(1), 1, atol=1e-3))


def _write(directory: Path, vectors: np.ndarray, queries: np.ndarray, k: int) -> dict[str, str]:
    exact = exact_search(queries, vectors, k)[1]
    paths = {}
    for name, array in (("vectors", vectors), ("queries", queries), ("exact", exact)):
        paths[name] = str(directory / f"{name}.npy")
        np.save(paths[name], array)
    return paths


def _compared(lines: list[dict[str, Any]], goal: float) -> dict[str, Any]:
    """Our rate over the best peer's, at the recall that is asked for."""
    rates = {}
    for line in lines:
        point = best(line["points"], goal)["best"]
        rates[line["engine"]] = None if point is None else point["queries_per_second"]
    peers = {name: rate for name, rate in rates.items() if name != "retro_jax" and rate is not None}
    strongest = max(peers, key=peers.get) if peers else None
    ours = rates["retro_jax"]
    ratio = ours / peers[strongest] if strongest and ours else None
    return {"recall_goal": goal, "queries_per_second": rates, "best_peer": strongest, "ratio_to_best_peer": ratio}
