"""Neighbours put into BM25's order: dense retrieval finds the candidates, shared tokens decide which come first.

(Doostmohammadi et al. 2023, arXiv 2305.16243.) A neighbours stage is read and another one written, of the same format.
"""

import dataclasses
import os

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.corpus import Corpus
from retro_jax.data.stage import Manifest, Stage, shard_name
from retro_jax.errors import UserError
from retro_jax.progress import Progress
from retro_jax.retrieval.bm25 import Bm25
from retro_jax.retrieval.neighbours import NeighbourTable, neighbour_dtype

_QUERIES_AT_ONCE = 1024


def rerank_neighbours(
    corpus: Corpus,
    candidates: NeighbourTable,
    bm25: Bm25,
    directory: str | os.PathLike,
    *,
    k: int,
    depth: int | None = None,
) -> Manifest:
    """Writes the k candidates of every chunk that score best by BM25; goes on after the last shard.

    Equally good ones stay in the order they have. What was filtered out of the candidates stays out. Negated scores are
    in the place of distances.

    Args:
      corpus: whose chunks the neighbours are of.
      candidates: its neighbours by another retriever, many more than k.
      bm25: over the database that they were found in.
      directory: to write.
      k: neighbours kept of each chunk.
      depth: how many candidates of each chunk are looked at, the first ones; None: all.

    Raises:
      UserError: candidates of another corpus or database, fewer than k of them, a damaged shard, or the directory
        belongs to something else.
    """
    depth = candidates.k if depth is None else depth
    if not 1 <= k <= depth <= candidates.k:
        raise UserError(
            f"{k} of {depth} candidates are asked for; {candidates.directory} has {candidates.k} a chunk: find more"
        )
    if candidates.corpus_fingerprint != corpus.fingerprint:
        raise UserError(f"{candidates.directory} has the neighbours of another corpus than {corpus.directory}")
    if candidates.database_corpus_fingerprint != bm25.corpus.fingerprint:
        raise UserError(f"{candidates.directory} was found in another database than {bm25.corpus.directory}")
    described = {"k": k, "filter": candidates.filter, "deduplicate": candidates.manifest.settings.get("deduplicate")}
    settings = {**described, "reranked": {"depth": depth, "bm25": dataclasses.asdict(bm25.settings)}}
    inputs = {
        "corpus": corpus.fingerprint,
        "candidates": candidates.fingerprint,
        "database": candidates.database_fingerprint,
        "database_corpus": candidates.database_corpus_fingerprint,
        "bm25": bm25.fingerprint,
    }
    offsets = np.asarray(corpus.shard_offsets).tolist()
    count = len(offsets) - 1
    with Stage(directory, "neighbours", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        survivors = np.zeros(k + 1, np.int64)
        names = [shard_name("neighbours", i, count, ".npy") for i in range(count)]
        with Progress("re-ranking", total=corpus.num_chunks, unit="chunks") as progress:
            for name, first, stop in zip(names, offsets[:-1], offsets[1:], strict=True):
                if not stage.has(name):
                    corpus.verify(range(first, stop))
                    candidates.verify(range(first, stop))
                    with stage.shard(name) as (path, counts), ArrayWriter(path, neighbour_dtype(k)) as file:
                        counts["survivors"] = _rerank(
                            corpus, candidates, bm25, k, depth, range(first, stop), file
                        ).tolist()
                survivors += stage.counts(name)["survivors"]
                progress.update(stop - first)
        totals = {"chunks": corpus.num_chunks, "fewer_than_k": int(survivors[:-1].sum())}
        return stage.finish(totals | {"survivors": survivors.tolist()})


def _rerank(
    corpus: Corpus, candidates: NeighbourTable, bm25: Bm25, k: int, depth: int, part: range, file: ArrayWriter
) -> np.ndarray:
    """Writes the rows of the chunks of a part; how many of them have 0, 1, ..., k neighbours."""
    survivors = np.zeros(k + 1, np.int64)
    for first in range(0, len(part), _QUERIES_AT_ONCE):
        chunks = np.array(part[first : first + _QUERIES_AT_ONCE])
        ids = candidates.ids(chunks)[:, :depth]
        distances = np.where(ids >= 0, -bm25.scores(corpus.tokens(chunks), ids), np.inf)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        rows = np.empty(len(chunks), neighbour_dtype(k))
        rows["ids"] = np.take_along_axis(ids, order, 1)
        rows["distances"] = np.take_along_axis(distances, order, 1)
        file.append(rows)
        survivors += np.bincount((rows["ids"] >= 0).sum(1), minlength=k + 1)
    return survivors
