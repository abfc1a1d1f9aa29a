"""A front knows which shards a query visits as the shard servers know it."""

from types import SimpleNamespace

import numpy as np
import pytest

from retro_jax.retrieval.router import Router
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.routing import Routes, router_messages
from retro_jax.retrieval.service.wire import Query, RefusedError

VERSION = pb.Version(dimension=3, num_shards=7)


def router(seed: int, shards: int) -> Router:
    rng = np.random.default_rng(seed)
    centroids = rng.normal(size=(12, 3)).astype(np.float32)
    return Router(centroids, np.arange(12, dtype=np.int32) % shards, 2, rng.integers(1, 30, shards))


def test_a_query_visits_what_the_routers_of_all_parts_say_where_more_than_k_are_fetched():
    indexes = [
        SimpleNamespace(num_shards=4, router=router(0, 4)),
        SimpleNamespace(num_shards=1, router=None),
        SimpleNamespace(num_shards=2, router=router(1, 2)),
    ]
    sent = [pb.Router.FromString(message.SerializeToString()) for message in router_messages(indexes)]
    routes = Routes(sent, VERSION)
    vectors = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    for k in (1, 3, 40):
        visits = routes.visits(Query(vectors, k, None))
        fetched = 2 * k + 8
        expected = [indexes[0].router.visits(vectors, fetched), indexes[2].router.visits(vectors, fetched)]
        np.testing.assert_array_equal(visits[:, :4], expected[0])
        assert visits[:, 4].all()
        np.testing.assert_array_equal(visits[:, 5:], expected[1])
    assert not routes.visits(Query(vectors, 1, None)).all()


def test_without_routers_nothing_is_sent_and_what_does_not_fit_is_refused():
    assert router_messages([SimpleNamespace(num_shards=4, router=None)] * 2) == []
    messages = router_messages([SimpleNamespace(num_shards=4, router=router(0, 4))])
    with pytest.raises(RefusedError, match="routers of 4 shards, the database has 7"):
        Routes(messages, VERSION)
    messages[0].shard_of_cell = b"1234"
    with pytest.raises(RefusedError, match="shard_of_cell has 4 bytes"):
        Routes(messages, VERSION)
