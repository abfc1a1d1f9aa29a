"""Prints what a database of N tokens takes: bytes of chunks, embeddings and index, memory, hosts, cost of a query.

    python tools/plan_database.py --tokens=1.75e12 --dimension=768 --by_cluster
    python tools/plan_database.py --tokens=5e9 --dimension=384 --host_memory=32 --rescore=bfloat16

The first is the paper's database. Nothing is measured: the formulas stand in retro_jax/retrieval/plan.py.
"""

from absl import flags

from retro_jax.errors import UserError
from retro_jax.program import run
from retro_jax.retrieval.index_settings import BUILD_MEMORY, RESCORINGS, IndexSettings
from retro_jax.retrieval.plan import CORE_BYTES_PER_SECOND, plan_database

_TOKENS = flags.DEFINE_string("tokens", None, "tokens of the database, also as 1.75e12", required=True)
_DIMENSION = flags.DEFINE_integer("dimension", 768, "components of a vector", lower_bound=1)
_K = flags.DEFINE_integer("k", 2, "neighbours of a query", lower_bound=1)
_CHUNK_LENGTH = flags.DEFINE_integer("chunk_length", 64, "tokens of a chunk", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 128_000, "of the tokenizer", lower_bound=1)
_NORMALIZED = flags.DEFINE_bool("normalized", True, "vectors have length 1")
_HOST_MEMORY = flags.DEFINE_float("host_memory", 64, "GiB of a host", lower_bound=0.1)
_BUILD_MEMORY = flags.DEFINE_float("build_memory", BUILD_MEMORY / 1e9, "GB that building one shard may take")
_NUM_SHARDS = flags.DEFINE_integer("num_shards", None, "shards; default: by --build_memory", lower_bound=1)
_RESCORE = flags.DEFINE_enum("rescore", None, RESCORINGS, "what candidates are rescored in; default: by rule")
_SPILL = flags.DEFINE_float("spill", None, "weight of a second leaf (SOAR)")
_BY_CLUSTER = flags.DEFINE_bool("by_cluster", False, "shards are made of cells, and a query visits few of them")
_VISITED = flags.DEFINE_float("visited_share", 0.02, "share of the shards that a query visits then")
_LEAVES = flags.DEFINE_float("leaves_share", 0.02, "share of a shard's leaves that a query visits")
_CORE = flags.DEFINE_float("core_rate", CORE_BYTES_PER_SECOND / 1e9, "GB/s that a core reads while it searches")


def main() -> None:
    try:
        tokens = int(float(_TOKENS.value))
    except (ValueError, OverflowError):
        raise UserError(f"--tokens={_TOKENS.value}: not a number") from None
    plan = plan_database(
        tokens,
        _DIMENSION.value,
        k=_K.value,
        chunk_length=_CHUNK_LENGTH.value,
        vocab_size=_VOCAB_SIZE.value,
        normalized=_NORMALIZED.value,
        host_memory=_HOST_MEMORY.value * 2**30,
        settings=IndexSettings(rescore=_RESCORE.value, spill=_SPILL.value),
        num_shards=_NUM_SHARDS.value,
        build_memory=_BUILD_MEMORY.value * 1e9,
        by_cluster=_BY_CLUSTER.value,
        visited_share=_VISITED.value,
        leaves_share=_LEAVES.value,
        core_bytes_per_second=_CORE.value * 1e9,
    )
    made = plan.settings
    shape = made.kind.replace("_", " ")
    if made.kind == "tree":
        shape = f"tree of {made.num_leaves:,} leaves, {made.dimensions_per_block} components a code, {made.rescore}"
    rows = [
        ("tokens", f"{tokens:,}"),
        ("chunks", f"{plan.chunks:,}"),
        ("chunk files", _size(plan.chunk_bytes)),
        ("embedding files", _size(plan.embedding_bytes)),
        ("index files", _size(plan.index_bytes)),
        ("index in memory", _size(plan.index_memory)),
        ("shards", f"{plan.shards:,} of {plan.vectors_per_shard:,} vectors ({shape})"),
        ("memory to build one", _size(plan.build_memory)),
        ("hosts", f"{plan.hosts:,} of {_HOST_MEMORY.value:g} GiB, each shard once; times replicas"),
        ("shards a query visits", f"{plan.shards_visited:,}"),
        ("read by a query", _size(plan.query_bytes)),
        ("core time of a query", f"{1e3 * plan.query_seconds:,.3g} ms at {_CORE.value:g} GB/s"),
        ("to search with every chunk", f"{plan.precompute_core_hours:,.3g} core hours"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


if __name__ == "__main__":
    run(main)
