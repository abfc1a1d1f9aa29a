"""Times the reading of sequences from a cold start: `python -m benchmarks.reading JSON`.

Also writes synthetic sequences, so that the benchmark needs no data set.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks import measure
from retro_jax import program
from retro_jax.data.batches import Batches
from retro_jax.data.corpus import TOKENIZER_FILE
from retro_jax.data.records import SequenceSchema
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.stage import Stage, shard_name
from retro_jax.data.tfrecord import RecordWriter

_SHARDS = 4


def write_synthetic(directory: Path, schema: SequenceSchema, sequences: int) -> None:
    """A directory like that of tools/write_sequences.py, of random tokens."""
    generator = np.random.default_rng(0)
    settings, inputs = {"schema": dataclasses.asdict(schema), "synthetic": sequences}, {"tokenizer": "synthetic"}
    with Stage(directory, "sequences", settings=settings, inputs=inputs) as stage:
        for index in range(_SHARDS):
            with (
                stage.shard(shard_name("sequences", index, _SHARDS, ".tfrecord")) as (path, _),
                RecordWriter(path) as writer,
            ):
                for _ in range(sequences // _SHARDS):
                    example = {
                        name: generator.integers(0, schema.vocab_size, shape).astype(dtype)
                        for name, (dtype, shape) in schema.features.items()
                    }
                    writer.write(schema.encode(example))
        with stage.shard(TOKENIZER_FILE) as (path, _):
            path.write_bytes(b"")
        stage.finish({"sequences": sequences})


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    started = time.time() - job["launched"]
    cores = measure.limit_cores(job["cores"])
    dropped = _drop_from_page_cache(Path(job["sequences"]))
    begun = time.perf_counter()
    source = SequenceSource(job["sequences"])
    batches = Batches([source], batch_size=job["batch_size"], seed=0)
    opened = time.perf_counter()
    waits = []
    with batches.iterate() as stream:
        for _ in range(job["batches"]):
            asked = time.perf_counter()
            next(stream)
            waits.append(time.perf_counter() - asked)
        ended = time.perf_counter()
    sequences = job["batches"] * job["batch_size"]
    measure.report(
        {
            "batch_size": job["batch_size"],
            "length": source.schema.length,
            "k": source.schema.neighbours,
            "sequences_stored": len(source),
            "sequences_read": sequences,
            "cores": cores,
            "page_cache": "dropped before" if dropped else "as it was",
            "process_start_seconds": started,
            "open_seconds": opened - begun,
            "first_batch_seconds": waits[0],
            "wait_seconds_median": statistics.median(waits[1:]),
            "wait_seconds_p90": float(np.quantile(waits[1:], 0.9)),
            "sequences_per_second": sequences / (ended - begun),
            "target_tokens_per_second": sequences * source.schema.length / (ended - begun),
            "peak_memory_bytes": measure.peak_memory_bytes(),
        }
    )


def _drop_from_page_cache(directory: Path) -> bool:
    """Asks the system to forget what it holds of the files, so that they are read from the disk; False if it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


if __name__ == "__main__":
    program.run(main, positional=True)
