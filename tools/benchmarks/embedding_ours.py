"""Times our embedder on texts: `python -m benchmarks.embedding_ours JSON`."""

import json
import time
from pathlib import Path

import numpy as np

from benchmarks import measure
from retro_jax import program


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    cores = measure.limit_cores(job["cores"])
    import jax  # after the cores are set: XLA counts them once

    from retro_jax.retrieval.embedder import Embedder
    from retro_jax.retrieval.wordpiece import WordPiece

    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    begun = time.perf_counter()
    embedder = Embedder.load(job["checkpoint"], normalize=True, **job["options"])
    vectors = embedder.embed(texts).vectors
    loaded = time.perf_counter() - begun
    np.save(Path(job["folder"]) / f"{job['side']}.npy", vectors)
    device = jax.local_devices()[0]
    measure.report(
        {
            "chunks_per_second": measure.rate(lambda: embedder.embed(texts), len(texts), job["seconds"]),
            "load_seconds": loaded,
            "word_pieces": [len(pieces) + 2 for pieces in WordPiece(job["checkpoint"])(texts)],
            "peak_memory_bytes": measure.peak_memory_bytes(),
            "cores": cores,
            "version": jax.__version__,
            "device": f"{jax.local_device_count()} x {device.device_kind}",
        }
    )


if __name__ == "__main__":
    program.run(main, positional=True)
