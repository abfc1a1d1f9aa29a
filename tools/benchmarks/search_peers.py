"""Builds an index of FAISS or hnswlib, or searches it: `python -m benchmarks.search_peers JSON`, where they are."""

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measure, search_measure

_LADDER = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)
_WIDE = tuple(value for value in _LADDER if value >= 8)  # of a graph's candidates


@dataclasses.dataclass(frozen=True)
class Engine:
    """A way to search.

    Attributes:
      build: (vectors, file to write).
      load: (file, dimension, cores that may search) -> index.
      search: (index, queries, k, setting) -> rows [q, k].
      settings: from little work to much.
    """

    build: Callable[[np.ndarray, str], None]
    load: Callable[[str, int, int], Any]
    search: Callable[[Any, np.ndarray, int, Any], np.ndarray]
    settings: tuple[Any, ...]


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    engine = ENGINES[job["engine"]]
    vectors = np.load(job["vectors"])
    file = os.path.join(job["folder"], job["engine"])
    if job["do"] == "build":
        begun = time.perf_counter()
        engine.build(vectors, file)
        measure.report(
            {
                "build_seconds": time.perf_counter() - begun,
                "bytes_per_vector": os.path.getsize(file) / len(vectors),
                "peak_memory_bytes": measure.peak_memory_bytes(),
                "version": importlib.metadata.version("hnswlib" if job["engine"] == "hnswlib" else "faiss-cpu"),
            }
        )
        return
    measure.limit_cores(job["cores"])
    index = engine.load(file, vectors.shape[1], job["cores"])
    queries, exact = np.load(job["queries"]), np.load(job["exact"])

    def search(block: np.ndarray, setting: Any) -> np.ndarray:
        return engine.search(index, block, job["k"], setting)

    points = search_measure.curve(search, engine.settings, vectors, queries, exact, seconds=job["seconds"])
    measure.report({"points": points})


def _faiss(factory: Callable[[int, int], str], parameters: Callable[[Any], Any], settings: tuple[Any, ...]) -> Engine:
    """An index of FAISS: its factory's text for (n, dimension), and what a setting is to a search."""

    def build(vectors: np.ndarray, file: str) -> None:
        import faiss

        # On vectors of length 1 the order is that of L2; the inner product is what the fast scan is quickest with.
        unit = np.allclose(np.square(vectors[:1000]).sum(1), 1, atol=1e-3)
        metric = faiss.METRIC_INNER_PRODUCT if unit else faiss.METRIC_L2
        index = faiss.index_factory(vectors.shape[1], factory(*vectors.shape), metric)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, file)

    def load(file: str, dimension: int, cores: int) -> Any:
        import faiss

        faiss.omp_set_num_threads(cores)
        return faiss.read_index(file)

    def search(index: Any, queries: np.ndarray, k: int, setting: Any) -> np.ndarray:
        return index.search(queries, k, params=parameters(setting))[1]

    return Engine(build, load, search, settings)


def _lists(n: int) -> int:
    """Lists of an inverted file: 2 sqrt(n), rounded to a power of two."""
    return 2 ** round(np.log2(2 * np.sqrt(n)))


def _refined(setting: list[int]) -> Any:
    import faiss

    inner = faiss.SearchParametersIVF(nprobe=setting[0])
    return faiss.IndexRefineSearchParameters(k_factor=float(setting[1]), base_index_params=inner)


def _probed(setting: int) -> Any:
    import faiss

    return faiss.SearchParametersIVF(nprobe=setting)


def _walked(setting: int) -> Any:
    import faiss

    return faiss.SearchParametersHNSW(efSearch=setting)


def _build_hnswlib(vectors: np.ndarray, file: str) -> None:
    import hnswlib

    index = hnswlib.Index(space="l2", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), ef_construction=200, M=16, random_seed=0)
    index.add_items(vectors)
    index.save_index(file)


def _load_hnswlib(file: str, dimension: int, cores: int) -> Any:
    import hnswlib

    index = hnswlib.Index(space="l2", dim=dimension)
    index.load_index(file)
    index.set_num_threads(cores)
    return index


def _search_hnswlib(index: Any, queries: np.ndarray, k: int, setting: int) -> np.ndarray:
    index.set_ef(setting)
    return index.knn_query(queries, k)[0].astype(np.int64)


_FAST_SCAN = tuple([probes, factor] for probes in _LADDER for factor in (6, 8, 12))
ENGINES = {
    "faiss_fast_scan": _faiss(lambda n, d: f"IVF{_lists(n)},PQ{d // 2}x4fs,RFlat", _refined, _FAST_SCAN),
    "faiss_fast_scan_fine": _faiss(lambda n, d: f"IVF{2 * _lists(n)},PQ{d // 2}x4fs,RFlat", _refined, _FAST_SCAN),
    "faiss_flat_lists": _faiss(lambda n, d: f"IVF{_lists(n)},Flat", _probed, _LADDER),
    "faiss_hnsw": _faiss(lambda n, d: "HNSW32,Flat", _walked, _WIDE),
    "faiss_exact": _faiss(lambda n, d: "Flat", lambda setting: None, (0,)),
    "hnswlib": Engine(_build_hnswlib, _load_hnswlib, _search_hnswlib, _WIDE),
}


if __name__ == "__main__":
    main(sys.argv[1:])
