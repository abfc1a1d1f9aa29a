"""Builds all that is deterministic, from duplicates to sequences: build_all.py ROOT OUTPUT WORKERS.

The embeddings are made up, since embedding is a program for devices; the index is one of exact search, since trees that
are learnt twice differ.
"""

import sys
from pathlib import Path

import numpy as np

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.distribute import BeamOptions
from retro_jax.data.duplicates import find_duplicates
from retro_jax.data.sequences import write_sequences
from retro_jax.data.stage import Stage, shard_name
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours

DIMENSION = 16


def build_all(root: Path, output: Path, workers: int) -> None:
    options = BeamOptions(workers=workers)
    train, valid = sorted(root.glob("train-*.jsonl")), sorted(root.glob("valid-*.jsonl"))
    find_duplicates(train, valid, output / "duplicates", options=options)
    tokenizer = Tokenizer(root / "tokenizer.model")
    build_corpus(train, tokenizer, output / "corpus", chunk_length=8, exclusions=output / "duplicates", options=options)
    corpus = Corpus(output / "corpus")
    make_embeddings(corpus, output / "embeddings")
    brute_force = IndexSettings(kind="brute_force")
    build_index(EmbeddingSet(output / "embeddings"), output / "index", brute_force, num_shards=4, options=options)
    find_neighbours(corpus, output, output / "neighbours", k=3, options=options)
    table = NeighbourTable(output / "neighbours")
    write_sequences(corpus, table, corpus, output / "sequences", length=64, k=2, shard_records=400, options=options)


def make_embeddings(corpus: Corpus, directory: Path) -> None:
    """Random vectors, the same at every call."""
    settings = {"embedder": {}, "embedder_fingerprint": "random", "dimension": DIMENSION}
    inputs = {"corpus": corpus.fingerprint, "tokenizer": corpus.tokenizer_fingerprint}
    sizes = np.diff(corpus.shard_offsets).tolist()
    with Stage(directory, "embeddings", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return
        for i, size in enumerate(sizes):
            name = shard_name("embeddings", i, len(sizes), ".npy")
            if not stage.has(name):
                vectors = np.random.default_rng(i).normal(size=(size, DIMENSION)).astype(np.float32)
                with stage.shard(name) as (path, _), open(path, "wb") as file:
                    np.save(file, vectors)
        stage.finish({"chunks": corpus.num_chunks, "empty": 0, "cut": 0})


if __name__ == "__main__":
    build_all(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
