"""Finds the nearest database chunks of every chunk of a corpus; run again it goes on where it stopped.

    python tools/find_neighbours.py --corpus=DB/corpus --database=DB --output=train/neighbours
    python tools/find_neighbours.py --corpus=valid/corpus --embeddings=valid/embeddings --database=DB \
        --output=valid/neighbours --filter=none

Hits of the chunk's own document are dropped for training (--filter=document), kept for evaluation (--filter=none).
"""

from absl import flags

from retro_jax.data.corpus import Corpus
from retro_jax.program import run
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.neighbours import FILTERS, find_neighbours

_CORPUS = flags.DEFINE_string("corpus", None, "corpus directory of the queries", required=True)
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "its embeddings; default: the database's own")
_DATABASE = flags.DEFINE_string("database", None, "directory with corpus/, embeddings/ and index/", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "neighbours directory to write", required=True)
_K = flags.DEFINE_integer("k", 16, "neighbours kept of each chunk; keep more than training uses")
_FILTER = flags.DEFINE_enum("filter", "document", FILTERS, "hits to drop")


def main() -> None:
    embeddings = None if _EMBEDDINGS.value is None else EmbeddingSet(_EMBEDDINGS.value)
    manifest = find_neighbours(
        Corpus(_CORPUS.value), _DATABASE.value, _OUTPUT.value, k=_K.value, filter=_FILTER.value, embeddings=embeddings
    )
    counts = manifest.counts
    print(
        f"{_OUTPUT.value}: {counts['chunks']:,} chunks, {_K.value} neighbours each; {counts['fewer_than_k']:,} have "
        f"fewer, {counts['empty']:,} have no vector, {counts['dropped']:,} hits of the same document dropped"
    )


if __name__ == "__main__":
    run(main)
