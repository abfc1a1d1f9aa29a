"""Recall of the shards in this process on the probes that were stored when the index was built."""

from collections.abc import Sequence

import numpy as np

from retro_jax.retrieval.index import PROBES, Index, shard_folder

_K = 2


def recall(indexes: Sequence[Index]) -> float | None:
    """Share found of the true 2 nearest neighbours in the loaded shards that a probe visits; None: no probes.

    A probe leaves itself out. Which of several equally near vectors is found does not matter.
    """
    hits = possible = 0
    for index in indexes:
        if index.size:
            found, there = _hits(index)
            hits, possible = hits + found, possible + there
    return hits / possible if possible else None


def _hits(index: Index) -> tuple[int, int]:
    probes = np.load(index.directory / PROBES, allow_pickle=False)
    folders = [index.directory / shard_folder(number, index.num_shards) for number in index.shards]
    answers = [np.load(folder / PROBES, allow_pickle=False) for folder in folders]
    queries = np.ascontiguousarray(probes["vector"])
    own = probes["id"][:, None]
    ids = np.concatenate([answer["exact_ids"] for answer in answers], axis=1)
    squares = np.concatenate([answer["exact"] for answer in answers], axis=1)
    if index.router is not None:
        visits = index.router.visits(queries, _K + 1)[:, list(index.shards)]
        squares = np.where(np.repeat(visits, ids.shape[1] // len(answers), axis=1), squares, np.inf)
    squares = np.where((ids == own) | (ids < 0), np.inf, squares)
    nearest = np.sort(squares, axis=1)[:, :_K]
    limits = np.max(np.where(np.isfinite(nearest), nearest, -1), axis=1, keepdims=True)
    good = np.where(squares <= limits * (1 + 1e-6) + 1e-12, ids, -1)
    found, _ = index.search(queries, _K + 1)
    found = np.where(found == own, -1, found)
    # A probe that does not find itself has one answer more, which does not count.
    found = np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable")[:, :_K], axis=1)
    hit = ((found[:, :, None] == good[:, None, :]) & (found[:, :, None] >= 0)).any(2).sum(1)
    there = np.isfinite(nearest).sum(1)
    return int(np.minimum(hit, there).sum()), int(there.sum())
