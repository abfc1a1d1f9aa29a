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


def test_a_small_plan_is_what_is_computed_by_hand():
    """Trees of vectors of length 1: in two leaves each, 2 components a code, rescored in bfloat16."""
    plan = plan_database(12_800_000, 384, num_shards=5, host_memory=100e6, chunk_length=64, vocab_size=128_000)
    assert (plan.chunks, plan.vectors_per_shard, plan.settings.num_leaves) == (200_000, 40_000, 280)  # 1.4 sqrt(40,000)
    assert plan.chunk_bytes == 200_000 * (64 * 4 + 4 + 4 + 2)
    assert plan.embedding_bytes == 200_000 * 384 * 4
    # On disk a code is a byte, in memory half of one; each copy has 4 bytes of its leaf, each vector 8 of its chunk.
    assert plan.index_bytes == 200_000 * (2 * (192 + 4) + 384 * 2 + 8) == 233_600_000
    assert plan.index_memory == 200_000 * (2 * (96 + 4) + 384 * 2 + 8) == 195_200_000
    assert plan.hosts == 3  # 39 MB a shard, so two of the five in the 80 MB that a host has for them
    assert plan.build_memory == 40_000 * (2 * 384 * 4 + 384 + 100)
    # Centres of all leaves, codes of 2 % of the leaves in both copies, 24 candidates in bfloat16.
    assert plan.query_bytes == 5 * (280 * 384 * 4 + 800 * 2 * 96 + 24 * 384 * 2)
    assert plan.query_seconds == pytest.approx(plan.query_bytes / 5e9)
    assert plan.precompute_core_hours == pytest.approx(200_000 * plan.query_bytes / 5e9 / 3600)
    by_cluster = plan_database(12_800_000, 384, num_shards=5, by_cluster=True, visited_share=0.3)
    assert by_cluster.shards_visited == 2 and by_cluster.query_bytes == plan.query_bytes * 2 / 5


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
