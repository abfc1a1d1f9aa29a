"""Builds the ScaNN index of a database's embeddings and measures its recall against exact search.

    python tools/build_index.py --embeddings=DB/embeddings --output=DB/index
    python tools/build_index.py --embeddings=DB/embeddings --output=DB/index --num_shards=16 --cells=512 --workers=2

The shards are built each for itself, and run again it goes on after the last finished one. Up to 20,000 vectors of a
shard are searched exactly (brute force), more with a tree of leaves and product codes. How many leaves a query visits
is measured, so that recall@2 reaches --min_recall; where it cannot, the build fails. With --cells the shards are made
of the cells of a clustering, and a query visits only those of its nearest cells. --settings takes what tune_index.py
wrote.
"""

import dataclasses

from absl import flags

from retro_jax.program import beam_options, define_beam_flags, run
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.index_build import MIN_RECALL, build_index
from retro_jax.retrieval.index_settings import KINDS, RESCORINGS, IndexSettings

_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "embeddings directory", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "index directory to write", required=True)
_NUM_SHARDS = flags.DEFINE_integer(
    "num_shards", None, "shards; default: as few as can be built with 32 GB of memory each", lower_bound=1
)
_CELLS = flags.DEFINE_integer("cells", 0, "cells to make the shards of; 0: shards are ranges of chunks", lower_bound=0)
_CELLS_TO_VISIT = flags.DEFINE_integer(
    "cells_to_visit", None, "cells whose shards a query visits; default: measured", lower_bound=1
)
_MIN_RECALL = flags.DEFINE_float("min_recall", MIN_RECALL, "recall@2 below which the build fails")
_SETTINGS = flags.DEFINE_string("settings", None, "JSON file of tools/tune_index.py; the flags below go before it")
_KIND = flags.DEFINE_enum("kind", None, KINDS, "how to search; default auto: by the number of vectors")
_NUM_LEAVES = flags.DEFINE_integer("num_leaves", None, "leaves of the tree; default: by rule")
_LEAVES_TO_SEARCH = flags.DEFINE_integer("leaves_to_search", None, "leaves a query visits; default: measured")
_REORDER = flags.DEFINE_integer("reorder", None, "candidates rescored; default: by rule")
_RESCORE = flags.DEFINE_enum("rescore", None, RESCORINGS, "what candidates are rescored in; bfloat16: half the memory")
_DIMENSIONS = flags.DEFINE_integer("dimensions_per_block", None, "components that share a 4-bit code; default: by rule")
_SPILL = flags.DEFINE_float("spill", None, "weight of a second leaf for every vector (SOAR), 0: none; default: by rule")
_LEAF_ETA = flags.DEFINE_float("leaf_eta", None, "anisotropy of the leaves' centres, 0: none; default: by rule")
define_beam_flags()


def main() -> None:
    settings = IndexSettings() if _SETTINGS.value is None else IndexSettings.load(_SETTINGS.value)
    names = (field.name for field in dataclasses.fields(IndexSettings))
    given = {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
    manifest = build_index(
        EmbeddingSet(_EMBEDDINGS.value),
        _OUTPUT.value,
        settings,
        num_shards=_NUM_SHARDS.value,
        cells=_CELLS.value,
        cells_to_visit=_CELLS_TO_VISIT.value,
        min_recall=_MIN_RECALL.value,
        options=beam_options(),
    )
    counts, made = manifest.counts, manifest.settings
    shards = f"{made['num_shards']} shards" if made["num_shards"] > 1 else "1 shard"
    visited = f", {counts['shards_visited']} of them visited by a query" if made["cells"] else ""
    print(
        f"{_OUTPUT.value}: {counts['vectors']:,} vectors in {shards} ({', '.join(counts['kinds'])}){visited}; recall@2 "
        f"{counts['recall_at_2']:.4f}, recall@10 {counts['recall_at_10']:.4f} against exact search on "
        f"{counts['recall_queries']} queries"
    )


if __name__ == "__main__":
    run(main)
