"""The arithmetic of a database's size, and what it says of the paper's."""

import pytest

from retro_jax.errors import UserError
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.plan import plan_database


def test_the_papers_database():
    plan = plan_database(1_750_000_000_000, 768, by_cluster=True, settings=IndexSettings(rescore="bfloat16"))
    assert plan.chunks == 27_343_750_000
    assert plan.embedding_bytes == 4 * 768 * plan.chunks  # 84 TB; with the chunks 91, the paper's 93 for 1.79 T tokens
    assert 90e12 < plan.embedding_bytes + plan.chunk_bytes < 93e12
    assert plan.shards * plan.vectors_per_shard >= plan.chunks
    assert plan.shards_visited == pytest.approx(0.02 * plan.shards, abs=1)
    everywhere = plan_database(1_750_000_000_000, 768, settings=IndexSettings(rescore="bfloat16"))
    assert everywhere.query_seconds == pytest.approx(plan.query_seconds * plan.shards / plan.shards_visited)


def test_a_database_that_fits_one_host():
    plan = plan_database(6_400_000, 384)
    assert (plan.chunks, plan.shards, plan.hosts, plan.shards_visited) == (100_000, 1, 1, 1)
    assert plan.settings.kind == "tree"
    more = plan_database(6_400_000, 384, num_shards=4, host_memory=2**25)
    assert more.hosts == 4 and more.shards == 4


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="take more --num_shards"):
        plan_database(10**12, 768, host_memory=2**30)
    with pytest.raises(UserError, match="tokens must be at least 1"):
        plan_database(0, 768)
    for name, value in (
        ("core_bytes_per_second", 0.0),
        ("core_bytes_per_second", float("nan")),
        ("host_memory", -1.0),
        ("visited_share", 0.0),
        ("leaves_share", 2.0),
    ):
        told = name.replace("core_bytes_per_second", "core_rate")
        with pytest.raises(UserError, match=f"{told} must be .*above 0"):
            plan_database(10**6, 768, **{name: value})
