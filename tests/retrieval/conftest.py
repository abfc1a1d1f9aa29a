"""Embedders and small data sets for the retrieval tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.stage import Stage, shard_name
from retro_jax.data.tokenizer import Tokenizer, train_tokenizer
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet

SAMPLE = Path(__file__).resolve().parents[2] / "experiments" / "sample" / "sample.jsonl"


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    with open(SAMPLE, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="session")
def minilm(embedder_directory) -> Embedder:
    """The pretrained embedder, vectors as the mean gives them."""
    return Embedder.load(embedder_directory, normalize=False)


@pytest.fixture(scope="session")
def tiny_embedder(tmp_path_factory) -> Embedder:
    """A BERT of random weights: quick, and as good as any where vectors only have to exist."""
    directory = tiny_bert.write_tiny_bert(tmp_path_factory.mktemp("tiny_bert"))
    return Embedder.load(directory, normalize=False, max_length=96, lengths=(96,), rows_per_device=8)


@pytest.fixture(scope="session")
def tokenizer(sample_texts, tmp_path_factory) -> Tokenizer:
    return train_tokenizer(sample_texts[:8], tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=800)


@pytest.fixture(scope="session")
def make_corpus(tokenizer, tmp_path_factory):
    """`make_corpus([[record, ...], ...])` builds a corpus with one shard for each list; chunks of 16 tokens."""

    def make(shards: list[list[dict]], directory: Path | None = None) -> Corpus:
        directory = directory or tmp_path_factory.mktemp("corpus")
        inputs = []
        for i, records in enumerate(shards):
            path = tmp_path_factory.mktemp("text") / f"text-{i}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            inputs.append(path)
        build_corpus(inputs, tokenizer, directory, chunk_length=16)
        return Corpus(directory)

    return make


@pytest.fixture(scope="session")
def make_embeddings(tmp_path_factory):
    """`make_embeddings([array, ...])` writes vectors of our own as a finished embeddings stage."""

    def make(
        shards: list[np.ndarray],
        *,
        corpus="c0ffee",
        embedder="facade",
        embedder_settings=None,
        directory=None,
        checked=True,
    ):
        directory = directory or tmp_path_factory.mktemp("embeddings")
        dimension = shards[0].shape[1]
        settings = {"embedder": embedder_settings or {}, "embedder_fingerprint": embedder, "dimension": dimension}
        with Stage(directory, "embeddings", settings=settings, inputs={"corpus": corpus, "tokenizer": "0"}) as stage:
            for i, array in enumerate(shards):
                name = shard_name("embeddings", i, len(shards), ".npy")
                with stage.shard(name) as (path, _), open(path, "wb") as file:
                    np.save(file, array.astype(np.float32))
            empty = sum(int((~array.any(1)).sum()) for array in shards)
            stage.finish({"chunks": sum(map(len, shards)), "empty": empty, "cut": 0})
        return EmbeddingSet(directory, verify=checked)

    return make
