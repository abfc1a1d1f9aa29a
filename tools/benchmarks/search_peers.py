"""Builds and searches an index of FAISS or hnswlib: `python -m benchmarks.search_peers JSON`, in their environment."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measure, search_measure

_LADDER = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512)

Search = Callable[[np.ndarray, Any], np.ndarray]


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    vectors, queries, exact = (np.load(job[name]) for name in ("vectors", "queries", "exact"))
    begun = time.perf_counter()
    search, settings, size, version = ENGINES[job["engine"]](vectors, job["k"], job["cores"])
    seconds = time.perf_counter() - begun
    measure.report(
        {
            "version": version,
            "build_seconds": seconds,
            "bytes_per_vector": size / len(vectors),
            "points": search_measure.curve(search, settings, vectors, queries, exact, seconds=job["seconds"]),
            "peak_memory_bytes": measure.peak_memory_bytes(),
        }
    )


def faiss_fast_scan(vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    """IVF with 4-bit product codes, 2 components each, and exact refinement of the best."""
    return _fast_scan(_lists(len(vectors)), vectors, k, cores)


def faiss_fast_scan_fine(vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    """The same with twice as many lists."""
    return _fast_scan(2 * _lists(len(vectors)), vectors, k, cores)


def _fast_scan(lists: int, vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    index = _trained(f"IVF{lists},PQ{vectors.shape[1] // 2}x4fs,RFlat", vectors)
    parameters = [[probes, factor] for probes in _LADDER for factor in (8, 12)]

    def search(queries: np.ndarray, setting: list[int]) -> np.ndarray:
        import faiss

        inner = faiss.SearchParametersIVF(nprobe=setting[0])
        options = faiss.IndexRefineSearchParameters(k_factor=float(setting[1]), base_index_params=inner)
        return index.search(queries, k, params=options)[1]

    return _single(search, parameters, index, cores)


def faiss_flat_lists(vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    """IVF with the vectors themselves in the lists."""
    index = _trained(f"IVF{_lists(len(vectors))},Flat", vectors)

    def search(queries: np.ndarray, setting: int) -> np.ndarray:
        import faiss

        return index.search(queries, k, params=faiss.SearchParametersIVF(nprobe=setting))[1]

    return _single(search, list(_LADDER), index, cores)


def faiss_hnsw(vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    """A graph with 32 links a node."""
    index = _trained("HNSW32,Flat", vectors)

    def search(queries: np.ndarray, setting: int) -> np.ndarray:
        import faiss

        return index.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=setting))[1]

    return _single(search, [value for value in _LADDER if value >= 8], index, cores)


def faiss_exact(vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    """Every vector is compared."""
    index = _trained("Flat", vectors)
    return _single(lambda queries, _: index.search(queries, k)[1], [0], index, cores)


def hnswlib(vectors: np.ndarray, k: int, cores: int) -> tuple[Search, list[Any], int, str]:
    """A graph with 16 links a node, and twice as many at the bottom."""
    import importlib.metadata

    import hnswlib as library

    index = library.Index(space="l2", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), ef_construction=200, M=16, random_seed=0)
    index.add_items(vectors)
    index.set_num_threads(cores)

    def search(queries: np.ndarray, setting: int) -> np.ndarray:
        index.set_ef(setting)
        return index.knn_query(queries, k)[0].astype(np.int64)

    settings = [value for value in _LADDER if value >= 8]
    return search, settings, index.index_file_size(), f"hnswlib {importlib.metadata.version('hnswlib')}"


ENGINES = {
    "faiss_fast_scan": faiss_fast_scan,
    "faiss_fast_scan_fine": faiss_fast_scan_fine,
    "faiss_flat_lists": faiss_flat_lists,
    "faiss_hnsw": faiss_hnsw,
    "faiss_exact": faiss_exact,
    "hnswlib": hnswlib,
}


def _lists(n: int) -> int:
    """Lists of an inverted file: 2 sqrt(n), rounded to a power of two."""
    return 2 ** round(np.log2(2 * np.sqrt(n)))


def _trained(factory: str, vectors: np.ndarray) -> Any:
    import faiss

    # On vectors of length 1 the order is that of L2; the inner product is what the fast scan is quickest with.
    unit = np.allclose(np.square(vectors[:1000]).sum(1), 1, atol=1e-3)
    metric = faiss.METRIC_INNER_PRODUCT if unit else faiss.METRIC_L2
    index = faiss.index_factory(vectors.shape[1], factory, metric)
    index.train(vectors)
    index.add(vectors)
    return index


def _single(search: Search, settings: list[Any], index: Any, cores: int) -> tuple[Search, list[Any], int, str]:
    import faiss

    faiss.omp_set_num_threads(cores)
    return search, settings, faiss.serialize_index(index).nbytes, f"faiss {faiss.__version__}"


if __name__ == "__main__":
    main(sys.argv[1:])
