"""Builds our index, or searches one that is built: `python -m benchmarks.search_ours JSON`."""

import json
import time
from pathlib import Path

import numpy as np

from benchmarks import measure, search_measure
from retro_jax import program
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.scann_shard import ScannShard


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    if job["do"] == "search":
        measure.limit_cores(job["cores"])
    vectors = np.load(job["vectors"])
    folder = Path(job["folder"]) / "retro_jax"
    if job["do"] == "build":
        settings = IndexSettings(**job["settings"]).resolve(len(vectors), vectors.shape[1], unit=job["unit"])
        begun = time.perf_counter()
        files = ScannShard.build(vectors, settings).save(folder)
        measure.report(
            {
                "build_seconds": time.perf_counter() - begun,
                "bytes_per_vector": sum(file.stat().st_size for file in files) / len(vectors),
                "memory_bytes_per_vector": settings.memory_bytes(vectors.shape[1]),
                "num_leaves": settings.num_leaves,
                "peak_memory_bytes": measure.peak_memory_bytes(),
            }
        )
        return
    queries, exact = np.load(job["queries"]), np.load(job["exact"])
    settings = IndexSettings(**job["settings"]).resolve(len(vectors), vectors.shape[1], unit=job["unit"])
    shard = ScannShard.load(folder, settings, len(vectors), [file.name for file in folder.iterdir()])

    def search(block: np.ndarray, setting: list[int]) -> np.ndarray:
        return shard.search(block, job["k"], leaves=setting[0], reorder=setting[1])[0]

    measure.report(
        {"points": search_measure.curve(search, job["sweep"], vectors, queries, exact, seconds=job["seconds"])}
    )


if __name__ == "__main__":
    program.run(main, positional=True)
