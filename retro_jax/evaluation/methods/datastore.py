"""The datastore of kNN-LM: for every token of a database what the model had computed before it, and the token itself.

    DATASTORE/keys     [tokens, D] float16, an embeddings data set of tokens instead of chunks
    DATASTORE/index    ScaNN over them, as tools/build_index.py builds it; where there are too many for exact search

The tokens are those of the corpus, in its order, and are not written again. A key takes 2 D bytes on disk: a million
tokens 256 MB at D = 128, 2 GB at D = 1024 (the paper's Wikipedia, 4 B tokens of 1024 float32, is 15 TB). An index is
4 to 5 D bytes a token, on disk and in memory; twice that while it is built.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.corpus import Corpus
from retro_jax.data.stage import MANIFEST, Stage, shard_name
from retro_jax.errors import UserError
from retro_jax.evaluation.methods.activations import predictions
from retro_jax.evaluation.methods.method import MethodContext
from retro_jax.evaluation.passes import document_tokens
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.exact import exact_search
from retro_jax.retrieval.index_build import build_index
from retro_jax.retrieval.index_settings import BRUTE_FORCE_LIMIT, IndexSettings
from retro_jax.retrieval.segments import DatabaseCorpus

if TYPE_CHECKING:  # ScaNN is loaded only where it searches
    from retro_jax.retrieval.index import Index

_TREE_FROM = 1_000_000
_CHUNKS_A_SHARD = 16_384
_LARGEST = float(np.finfo(np.float16).max)


class Datastore:
    """A finished datastore, opened for search.

    Attributes:
      values: [n] int32, the token that each key predicts.
      fingerprint: of the keys and how they are searched.
    """

    def __init__(self, keys: EmbeddingSet, values: np.ndarray, index: "Index | None") -> None:
        self._keys = keys
        self._index = index
        self.values = values
        self.fingerprint = keys.fingerprint if index is None else index.fingerprint

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of queries [q, D]: squared distances float32 [q, k] (+inf), values int32 [q, k] (-1)."""
        search = self._index.search if self._index is not None else self._exact
        ids, distances = search(queries, k)
        return distances, np.where(ids >= 0, self.values[np.maximum(ids, 0)], -1).astype(np.int32)

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return exact_search(queries, self._keys, k)


def build_datastore(context: MethodContext, directory: str | os.PathLike) -> Datastore:
    """Computes the keys of a database, indexes them where they are many, and opens them; goes on after the last shard.

    Args:
      context: run, database, windows, and of the options `datastore_share` and `datastore_search`.
      directory: to write.

    Raises:
      UserError: a database of another tokenizer, or nothing in it; a directory that belongs to something else; an
        index with too little recall.
    """
    directory, options = Path(directory), context.options
    database = context.database_corpus()
    chosen = [_chosen_documents(database, part, options.datastore_share) for part in range(len(database.parts))]
    values = np.concatenate([_values(part, documents) for part, documents in zip(database.parts, chosen, strict=True)])
    if not len(values):
        raise UserError(f"{context.database}: no text, so there is nothing to remember")
    shards = [
        (corpus, documents)
        for corpus, some in zip(database.parts, chosen, strict=True)
        for documents in _shards(corpus, some)
    ]
    _write_keys(context, database, shards, directory / "keys")
    keys = EmbeddingSet(directory / "keys")
    assert len(keys) == len(values), f"{len(keys)} keys for {len(values)} tokens"
    kind = options.datastore_search
    if kind == "auto":
        kind = "exact" if len(keys) <= BRUTE_FORCE_LIMIT else "brute_force" if len(keys) <= _TREE_FROM else "tree"
    return Datastore(keys, values, None if kind == "exact" else _index(keys, directory / "index", kind))


def _index(keys: EmbeddingSet, directory: Path, kind: str) -> "Index":
    """The index of the keys: the one that is there, however it was built, or a new one.

    Keys lie in few directions, more so those of a model that is hardly trained, and product codes may not tell them
    apart: then a tree fails its recall, and tools/build_index.py can build another.
    """
    from retro_jax.retrieval.index import Index

    if not (directory / MANIFEST).is_file():
        build_index(keys, directory, IndexSettings(kind))
    index = Index.load(directory)
    if index.manifest.inputs["embeddings"] != keys.fingerprint:
        raise UserError(f"{directory} was built from other keys than {keys.directory}; remove it")
    return index


def _write_keys(
    context: MethodContext, database: DatabaseCorpus, shards: list[tuple[Corpus, np.ndarray]], directory: Path
) -> None:
    run, width = context.run, context.run.config.model.width
    embedder = {"kind": "input of the last feed-forward layer", "run": run.fingerprint, **context.windows}
    settings = {
        "embedder": embedder,
        "embedder_fingerprint": run.fingerprint,
        "dimension": width,
        "share": context.options.datastore_share,
        "removed": database.segments.removed_sha256,
    }
    inputs = {"corpus": database.fingerprint, "tokenizer": database.tokenizer_fingerprint}
    with Stage(directory, "embeddings", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return
        names = [shard_name("keys", i, len(shards), ".npy") for i in range(len(shards))]
        for number, (name, (corpus, documents)) in enumerate(zip(names, shards, strict=True)):
            if stage.has(name):
                continue
            found = predictions(
                context.with_keys,
                corpus,
                **context.windows,
                documents=documents,
                with_end=True,
                description=f"datastore, part {number + 1} of {len(shards)}",
            )
            with stage.shard(name) as (path, counts), ArrayWriter(path, np.dtype("<f2"), (width,)) as writer:
                for one in found:
                    if not np.abs(one.states).max() <= _LARGEST:
                        raise UserError(f"{run.workdir}: activations that float16 does not hold; no datastore of it")
                    writer.append(one.states)
                counts["keys"] = writer.rows
        stage.finish({"chunks": sum(stage.counts(name)["keys"] for name in names), "empty": 0, "cut": 0})


def _chosen_documents(database: DatabaseCorpus, part: int, share: float) -> np.ndarray:
    """Documents of a part that are remembered, evenly spread; none that is removed."""
    corpus = database.parts[part]
    firsts = np.concatenate([first for first, _ in corpus.document_ranges()])
    kept = np.flatnonzero(~database.removed(firsts + database.offsets[part]))
    return (
        kept[np.unique(np.linspace(0, len(kept) - 1, max(1, round(share * len(kept))), dtype=np.int64))]
        if len(kept)
        else kept
    )


def _shards(corpus: Corpus, documents: np.ndarray) -> list[np.ndarray]:
    """Consecutive documents, about as many chunks in each part."""
    sizes = np.cumsum([corpus.document_range(document)[1] for document in documents.tolist()])
    if not len(sizes):
        return []
    return np.split(documents, np.flatnonzero(np.diff((sizes - 1) // _CHUNKS_A_SHARD)) + 1)


def _values(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    """[n] int32: the tokens of documents behind their start tokens, end tokens among them."""
    found = [np.zeros(0, np.int32)]
    for document in documents.tolist():
        first, chunks = corpus.document_range(document)
        tokens = corpus.tokens(np.arange(first, first + chunks)).reshape(-1)
        found.append(tokens[1 : document_tokens(corpus, document)])
    return np.concatenate(found)
