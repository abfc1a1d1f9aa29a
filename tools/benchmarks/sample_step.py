"""Times our generation in a process of its own: `python -m benchmarks.sample_step JSON`.

With random parameters, which cost what others cost, and random neighbours, or those that a database finds.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks import measure
from retro_jax import program
from retro_jax.config import MeshConfig, RetroConfig, from_dict
from retro_jax.data.tokenizer import UNK_ID
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.neighbours import Neighbours, Retriever
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.retrieval.database import Database
from retro_jax.training.state import plan_model


@dataclasses.dataclass
class _Found:
    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


class _RandomNeighbours:
    """A retriever that costs next to nothing."""

    def __init__(self, model: RetroConfig) -> None:
        self._model, self._generator = model, np.random.default_rng(0)

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> _Found:
        shape = (len(chunk_tokens), k, self._model.neighbour_length)
        tokens = self._generator.integers(UNK_ID + 1, self._model.vocab_size, shape, np.int32)
        return _Found(np.zeros(shape[:2], np.int64), np.zeros(shape[:2], np.float32), tokens)


class _Timed:
    """A retriever and the time that it takes."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self.clear()

    def clear(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> Neighbours:
        begun = time.perf_counter()
        found = self._retriever.retrieve(chunk_tokens, k)
        self.seconds += time.perf_counter() - begun
        self.calls += 1
        return found


def _open_database(directory: str, embedder: str, model: RetroConfig) -> Database:
    from retro_jax.retrieval.embedder import Embedder, EmbeddingSet

    made = EmbeddingSet(Path(directory) / "embeddings").manifest.settings["embedder"]
    database = Database.open(
        directory, Embedder.load(embedder, normalize=made["normalize"], max_length=made["max_length"])
    )
    if database.corpus.vocab_size > model.vocab_size:
        raise UserError(
            f"{directory} has {database.corpus.vocab_size:,} tokens, the model {model.vocab_size:,}: give --vocab_size"
        )
    return database


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    cores = measure.limit_cores(job["cores"])
    config = from_dict(RetroConfig, job["model"])
    mesh = create_mesh(from_dict(MeshConfig, job["mesh"]))
    plan = plan_model(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.params)
    params = jax.jit(lambda: nnx.split(Retro(config, rngs=nnx.Rngs(0)))[1], out_shardings=shardings)()
    retriever, vocab_size = _RandomNeighbours(config), config.vocab_size
    if job["database"]:
        retriever = _open_database(job["database"], job["embedder"], config)
        vocab_size = retriever.corpus.vocab_size
    retriever = _Timed(retriever)
    context = -(-(job["prompt"] + max(job["lengths"])) // config.chunk_length) * config.chunk_length
    sampler = Sampler(
        config,
        plan,
        params,
        vocab_size=vocab_size,
        retriever=retriever,
        neighbours=job["k"],
        max_context=max(context, 2 * config.chunk_length),
        mesh=mesh,
    )
    cases = []
    for batch_size in job["batch_sizes"]:
        for length in job["lengths"]:
            begun = time.perf_counter()
            _time(sampler, retriever, vocab_size, config.chunk_length, job, batch_size, length)
            warm = time.perf_counter() - begun
            timed = _time(sampler, retriever, vocab_size, config.chunk_length, job, batch_size, length)
            cases.append({"batch_size": batch_size, "new_tokens": length, **timed, "first_run_seconds": warm})
    measure.report(
        {
            "cases": [
                {**case, "cores": cores, "peak_memory_bytes": measure.peak_memory_bytes(), "devices": mesh.size}
                for case in cases
            ]
        }
    )


def _time(
    sampler: Sampler,
    retriever: _Timed,
    vocab_size: int,
    chunk_length: int,
    job: dict[str, Any],
    batch_size: int,
    length: int,
) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    prompts = generator.integers(UNK_ID + 1, vocab_size, (batch_size, job["prompt"] - 1)).tolist()
    decoding = Decoding(top_k=int(job["top_k"] * vocab_size))
    retriever.clear()
    begun = time.perf_counter()
    arrivals = []  # of the first text's tokens
    for index, _ in sampler.generate_batch(
        [Request(prompt) for prompt in prompts], max_new_tokens=length, decoding=decoding, stop_at_end=False
    ):
        if index == 0:
            arrivals.append(time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    return {
        "tokens_per_second": batch_size * length / seconds,
        "seconds": seconds,
        "first_token_seconds": arrivals[0],
        "retrieval_seconds": retriever.seconds,
        "retrievals": retriever.calls,
        "token_seconds_by_position": _by_position(arrivals, job["prompt"], chunk_length),
    }


def _by_position(arrivals: list[float], prompt: int, chunk_length: int) -> dict[int, float]:
    """Seconds a token, of each whole chunk by the position of its first token; tokens arrive a chunk at a time."""
    firsts = range(-prompt % chunk_length or chunk_length, len(arrivals) - chunk_length + 1, chunk_length)
    return {
        prompt + first: (arrivals[first + chunk_length - 1] - arrivals[first - 1]) / chunk_length for first in firsts
    }


if __name__ == "__main__":
    program.run(main, positional=True)
