"""Which shards of a served database a query visits: told to a front, so that it asks only who has some of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.retrieval.excluding import first_fetch
from retro_jax.retrieval.router import Router
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.wire import Query, invalid, rows

if TYPE_CHECKING:  # brings ScaNN
    from retro_jax.retrieval.index import Index


def router_messages(indexes: Sequence["Index"]) -> list[pb.Router]:
    """One for each index of a database; empty where every query visits every shard."""
    if all(index.router is None for index in indexes):
        return []
    messages = []
    for index in indexes:
        message = pb.Router(num_shards=index.num_shards)
        if (router := index.router) is not None:
            message.centroids = np.ascontiguousarray(router.centroids, "<f4").tobytes()
            message.shard_of_cell = np.ascontiguousarray(router.shard_of_cell, "<i4").tobytes()
            message.cells_to_visit = router.cells_to_visit
            message.shard_sizes.extend(router.shard_sizes.tolist())
        messages.append(message)
    return messages


class Routes:
    """The routers of all parts of a database, its shards numbered through."""

    def __init__(self, messages: Sequence[pb.Router], version: pb.Version) -> None:
        """Reads those of a version.

        Raises:
          RefusedError: arrays that do not fit.
        """
        self._parts = [(message.num_shards, _read(message, version.dimension)) for message in messages]
        if (count := sum(count for count, _ in self._parts)) != version.num_shards:
            raise invalid(f"routers of {count} shards, the database has {version.num_shards}")

    def visits(self, query: Query) -> np.ndarray:
        """Bool [n, S]: shards that may hold an answer.

        A shard server visits as many shards as hold what it fetches (`excluding.search_excluding`): more than k where
        documents are excluded or removed.
        """
        fetched = first_fetch(query.k)
        parts = [
            np.ones((len(query.vectors), count), bool) if router is None else router.visits(query.vectors, fetched)
            for count, router in self._parts
        ]
        return np.concatenate(parts, axis=1)


def _read(message: pb.Router, dimension: int) -> Router | None:
    if not message.centroids:
        return None
    centroids = rows(message.centroids, "<f4", None, dimension, "centroids")
    shard_of_cell = rows(message.shard_of_cell, "<i4", len(centroids), 1, "shard_of_cell")[:, 0]
    return Router(centroids, shard_of_cell, message.cells_to_visit, np.array(message.shard_sizes, np.int64))
