"""Builds duplicates, corpus and sequences of a prepared directory: build_all.py ROOT OUTPUT WORKERS."""

import sys
from pathlib import Path

from random_neighbours import RandomNeighbours, random_table

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.distribute import BeamOptions
from retro_jax.data.duplicates import find_duplicates
from retro_jax.data.sequences import write_sequences
from retro_jax.data.tokenizer import Tokenizer


def build_all(root: Path, output: Path, workers: int) -> None:
    options = BeamOptions(workers=workers)
    train, valid = sorted(root.glob("train-*.jsonl")), sorted(root.glob("valid-*.jsonl"))
    find_duplicates(train, valid, output / "duplicates", options=options)
    tokenizer = Tokenizer(root / "tokenizer.model")
    build_corpus(train, tokenizer, output / "corpus", chunk_length=8, exclusions=output / "duplicates", options=options)
    corpus = Corpus(output / "corpus")
    if not (root / "table").is_dir():
        random_table(root / "table", corpus, corpus)
    table = RandomNeighbours(root / "table")
    write_sequences(corpus, table, corpus, output / "sequences", length=64, k=2, shard_records=400, options=options)


if __name__ == "__main__":
    build_all(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
