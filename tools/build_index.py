"""Builds the ScaNN index of a database's embeddings and measures its recall against exact search.

    python tools/build_index.py --embeddings=DB/embeddings --output=DB/index

Up to 20,000 vectors are searched exactly (brute force), more with a tree of leaves and product codes.
"""

from absl import flags

from retro_jax.program import run
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.index import KINDS, IndexSettings, build_index

_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "embeddings directory", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "index directory to write", required=True)
_KIND = flags.DEFINE_enum("kind", "auto", KINDS, "how to search; auto chooses by the number of vectors")
_NUM_LEAVES = flags.DEFINE_integer("num_leaves", None, "leaves of the tree; default: square root of the vectors")
_LEAVES_TO_SEARCH = flags.DEFINE_integer("leaves_to_search", None, "leaves a query visits; default: a tenth of them")
_REORDER = flags.DEFINE_integer("reorder", None, "candidates rescored exactly; default: 128")


def main() -> None:
    settings = IndexSettings(
        kind=_KIND.value,
        num_leaves=_NUM_LEAVES.value,
        leaves_to_search=_LEAVES_TO_SEARCH.value,
        reorder=_REORDER.value,
    )
    manifest = build_index(EmbeddingSet(_EMBEDDINGS.value), _OUTPUT.value, settings)
    counts, made = manifest.counts, manifest.settings["index"]
    shape = ""
    if made["kind"] == "tree":
        shape = f" of {made['num_leaves']} leaves, {made['leaves_to_search']} searched, {made['reorder']} rescored"
    print(
        f"{_OUTPUT.value}: {counts['vectors']:,} vectors, {made['kind']}{shape}; recall@2 {counts['recall_at_2']:.4f}, "
        f"recall@10 {counts['recall_at_10']:.4f} against exact search on {counts['recall_queries']} queries"
    )


if __name__ == "__main__":
    run(main)
