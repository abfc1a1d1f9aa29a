"""Finds by measurement the quickest settings of the index that reach a recall, for tools/build_index.py --settings.

    python tools/tune_index.py --embeddings=DB/embeddings --output=settings.json
    python tools/tune_index.py --embeddings=DB/embeddings --output=settings.json --vectors=100000 --cores=1

It measures on --vectors vectors of the database, as many as a shard is to have; queries are chunks beside them. Leaves,
spilling (SOAR), components a code, float32 or bfloat16, depth of rescoring and leaves to search are tried; the file
also has what was tried. The number of leaves is for that many vectors; how many are searched the build measures anew.
"""

import dataclasses
import os

import numpy as np
from absl import flags

from retro_jax.errors import UserError
from retro_jax.files import write_json
from retro_jax.program import run
from retro_jax.progress import Progress

_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "embeddings directory", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write", required=True)
_VECTORS = flags.DEFINE_integer("vectors", 100_000, "vectors of the index that is measured", lower_bound=1000)
_QUERIES = flags.DEFINE_integer("queries", 2048, "queries it is measured with", lower_bound=64)
_K = flags.DEFINE_integer("k", 2, "neighbours", lower_bound=1)
_RECALL = flags.DEFINE_float("min_recall", 0.955, "recall@k to reach; a little more than is wanted of other queries")
_CORES = flags.DEFINE_integer("cores", 0, "processor cores to use; 0 for all", lower_bound=0)
_SECONDS = flags.DEFINE_float("seconds", 0.5, "that a rate is measured over", lower_bound=0.001)
_SEED = flags.DEFINE_integer("seed", 0, "of the sample")


def main() -> None:
    if _CORES.value and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _CORES.value])
    # After it, since libraries count the cores when they are loaded.
    from retro_jax.retrieval.embedder import EmbeddingSet
    from retro_jax.retrieval.tuner import Tuner

    embeddings = EmbeddingSet(_EMBEDDINGS.value, verify=True)
    wanted = min(_VECTORS.value + _QUERIES.value, len(embeddings))
    chosen = np.sort(np.random.default_rng(_SEED.value).choice(len(embeddings), wanted, replace=False))
    rows = embeddings.vectors(chosen)
    rows = rows[rows.any(1)]
    if len(rows) < 2 * _QUERIES.value:
        raise UserError(f"{_EMBEDDINGS.value}: {len(rows):,} vectors are too few to tune with; use brute force")
    asked = np.zeros(len(rows), bool)
    asked[np.random.default_rng(_SEED.value + 1).choice(len(rows), _QUERIES.value, replace=False)] = True
    unit = bool(embeddings.manifest.settings["embedder"].get("normalize"))
    tuner = Tuner(rows[~asked], rows[asked], unit=unit, k=_K.value, goal=_RECALL.value, seconds=_SECONDS.value)
    with Progress("tuning", total=10 if unit else 6, unit="builds") as progress:
        for trial in tuner.tune():
            progress.update(1)
            print(_line(trial))
    best = tuner.best
    # The build measures the leaves to search on the vectors that it has.
    settings = {**dataclasses.asdict(best.settings), "leaves_to_search": None, "training_sample": 100_000}
    trials = [dataclasses.asdict(trial) for trial in tuner.trials]
    write_json(
        _OUTPUT.value,
        {"settings": settings, "vectors": int((~asked).sum()), "dimension": embeddings.dimension, "trials": trials},
    )
    print(f"{_OUTPUT.value}: {_line(best)}")


def _line(trial) -> str:
    made = trial.settings
    return (
        f"{made.num_leaves} leaves, {made.leaves_to_search} searched, {made.reorder} rescored in {made.rescore}, "
        f"{made.dimensions_per_block} components a code, spill {made.spill:g}, eta {made.leaf_eta:g}: "
        f"recall {trial.recall:.4f}, "
        f"{trial.queries_per_second:,.0f} queries/s, {trial.memory_bytes:.0f} bytes a vector, built in "
        f"{trial.build_seconds:.1f} s"
    )


if __name__ == "__main__":
    run(main)
