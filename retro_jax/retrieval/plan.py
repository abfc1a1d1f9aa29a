"""What a database of N tokens costs: bytes, shards, hosts and the work of a query, by arithmetic.

Formulas (n chunks, d components, S shards of n / S vectors, L leaves, l searched, r rescored):

    chunks      n (M t + 10)         t bytes a token id, 2 up to 65,536 ids and 4 above; length, bytes and document
    embeddings  4 n d
    index       n b                  b bytes a vector (`IndexSettings.disk_bytes`, `memory_bytes`)
    a query     visited shards x (4 L d + (n / S) (l / L) c + r d w) bytes read
                c bytes of codes a vector, w bytes of a component that is rescored

A query's time is the bytes it reads over the rate that one core reads at, which is to be measured where it matters.
"""

import dataclasses
import math

from retro_jax.errors import UserError
from retro_jax.retrieval.index_settings import BUILD_MEMORY, IndexSettings, build_bytes, shards_for

CORE_BYTES_PER_SECOND = 5e9
USABLE_MEMORY = 0.8  # of a host; the rest is for the system, requests and loading
_SEARCHED_LEAVES = 0.02
_ROUTED_CELLS = 0.02


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a database of some size takes. Bytes are bytes, not multiples.

    Attributes:
      chunks: n.
      shards: of the index.
      vectors_per_shard: n / shards.
      settings: of each shard.
      chunk_bytes, embedding_bytes, index_bytes: on disk.
      index_memory: of all shards loaded once.
      build_memory: of building one shard.
      hosts: that hold all shards once.
      shards_visited: by a query.
      query_bytes: read by a query over all shards.
      query_seconds: of one core.
      precompute_core_hours: to search with every chunk once.
    """

    chunks: int
    shards: int
    vectors_per_shard: int
    settings: IndexSettings
    chunk_bytes: int
    embedding_bytes: int
    index_bytes: int
    index_memory: int
    build_memory: int
    hosts: int
    shards_visited: int
    query_bytes: int
    query_seconds: float
    precompute_core_hours: float


def plan_database(
    tokens: int,
    dimension: int,
    *,
    k: int = 2,
    chunk_length: int = 64,
    vocab_size: int = 128_000,
    normalized: bool = True,
    host_memory: float = 64 * 2**30,
    settings: IndexSettings | None = None,
    num_shards: int | None = None,
    build_memory: float = BUILD_MEMORY,
    by_cluster: bool = False,
    visited_share: float = _ROUTED_CELLS,
    leaves_share: float = _SEARCHED_LEAVES,
    core_bytes_per_second: float = CORE_BYTES_PER_SECOND,
) -> Plan:
    """Costs of a database.

    Args:
      tokens: N, of the language model, in the whole database.
      dimension: d.
      k: neighbours of a query.
      chunk_length: M.
      vocab_size: of the tokenizer.
      normalized: vectors have length 1.
      host_memory: bytes of one host.
      settings: of the index.
      num_shards: None: by rule, from `build_memory`.
      build_memory: bytes that building one shard may take.
      by_cluster: shards are made of cells, and a query visits `visited_share` of them.
      leaves_share: of a tree's leaves that a query visits, where the settings do not say.
      core_bytes_per_second: that a core reads while it searches.

    Raises:
      UserError: a number out of range, or a shard that no host can hold.
    """
    for name, value in (("tokens", tokens), ("dimension", dimension), ("k", k), ("chunk_length", chunk_length)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, is {value}")
    for name, value in (("visited_share", visited_share), ("leaves_share", leaves_share)):
        if not 0 < value <= 1:
            raise UserError(f"{name} must be above 0 and at most 1, is {value:g}")
    for name, value in (("host_memory", host_memory), ("core_rate", core_bytes_per_second)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be a number above 0, is {value:g}")
    n = math.ceil(tokens / chunk_length)
    shards = num_shards or shards_for(n, dimension, build_memory)
    each = math.ceil(n / shards)
    made = (settings or IndexSettings()).resolve(each, dimension, unit=normalized)
    memory = made.memory_bytes(dimension)
    usable = host_memory * USABLE_MEMORY
    per_host = int(usable // (each * memory))
    if per_host < 1:
        raise UserError(
            f"a shard of {each:,} vectors takes {each * memory / 1e9:.1f} GB of memory, a host gives "
            f"{usable / 1e9:.1f} GB; take more --num_shards or --rescore=bfloat16"
        )
    visited = min(shards, max(1, math.ceil(shards * visited_share))) if by_cluster else shards
    read = visited * _query_bytes(made, each, dimension, k, leaves_share)
    seconds = read / core_bytes_per_second
    return Plan(
        chunks=n,
        shards=shards,
        vectors_per_shard=each,
        settings=made,
        chunk_bytes=n * (chunk_length * (2 if vocab_size <= 2**16 else 4) + 10),
        embedding_bytes=4 * n * dimension,
        index_bytes=round(n * made.disk_bytes(dimension)),
        index_memory=round(n * memory),
        build_memory=each * build_bytes(dimension),
        hosts=math.ceil(shards / per_host),
        shards_visited=visited,
        query_bytes=round(read),
        query_seconds=seconds,
        precompute_core_hours=n * seconds / 3600,
    )


def _query_bytes(settings: IndexSettings, vectors: int, dimension: int, k: int, leaves_share: float) -> float:
    """Bytes that a query reads in one shard."""
    if settings.kind == "brute_force":
        return 4 * dimension * vectors
    share = settings.leaves_to_search / settings.num_leaves if settings.leaves_to_search else leaves_share
    codes = math.ceil(dimension / settings.dimensions_per_block) / 2 * (2 if settings.spill else 1)
    rescored = max(settings.reorder, 4 * k) * dimension * (4 if settings.rescore == "float32" else 2)
    return 4 * settings.num_leaves * dimension + share * vectors * codes + rescored
