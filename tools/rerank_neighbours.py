"""Puts the neighbours of a corpus into BM25's order; run again it goes on where it stopped.

    python tools/find_neighbours.py --corpus=valid/corpus --embeddings=valid/embeddings --database=DB --k=100 \
        --filter=none --output=valid/candidates
    python tools/rerank_neighbours.py --corpus=valid/corpus --candidates=valid/candidates --database=DB --k=10 \
        --output=valid/neighbours

What it writes is read as any other neighbours, for training and for evaluation. What --filter dropped stays dropped.
"""

from absl import flags

from retro_jax.data.corpus import Corpus
from retro_jax.program import run
from retro_jax.retrieval.bm25 import Bm25, Bm25Settings
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.reranking import rerank_neighbours

_CORPUS = flags.DEFINE_string("corpus", None, "corpus directory of the queries", required=True)
_CANDIDATES = flags.DEFINE_string("candidates", None, "neighbours directory with more than k a chunk", required=True)
_DATABASE = flags.DEFINE_string("database", None, "directory with corpus/ that they were found in", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "neighbours directory to write", required=True)
_K = flags.DEFINE_integer("k", 16, "neighbours kept of each chunk")
_DEPTH = flags.DEFINE_integer("depth", None, "candidates of each chunk that are looked at; default: all")
_K1 = flags.DEFINE_float("k1", Bm25Settings.k1, "BM25: how soon repetition of a token stops to count")
_B = flags.DEFINE_float("b", Bm25Settings.b, "BM25: how much a chunk's length is discounted")


def main() -> None:
    manifest = rerank_neighbours(
        Corpus(_CORPUS.value),
        NeighbourTable(_CANDIDATES.value),
        Bm25.open(_DATABASE.value, Bm25Settings(_K1.value, _B.value)),
        _OUTPUT.value,
        k=_K.value,
        depth=_DEPTH.value,
    )
    counts = manifest.counts
    print(f"{_OUTPUT.value}: {counts['chunks']:,} chunks, {_K.value} neighbours each; {counts['fewer_than_k']:,} fewer")


if __name__ == "__main__":
    run(main)
