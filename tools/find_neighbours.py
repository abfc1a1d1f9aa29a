"""Finds the nearest database chunks of every chunk of a corpus; run again it goes on where it stopped.

    python tools/find_neighbours.py --corpus=DB/corpus --database=DB --output=train/neighbours
    python tools/find_neighbours.py --corpus=valid/corpus --embeddings=valid/embeddings --database=DB \
        --output=valid/neighbours --filter=none
    python tools/find_neighbours.py --corpus=DB/corpus --embeddings=DB/embeddings --service=front:50051 \
        --output=train/neighbours --workers=4
    python tools/find_neighbours.py --corpus=DB/corpus --database=DB --retriever=bm25 --output=train/bm25_neighbours

Hits of the chunk's own document are dropped for training (--filter=document), kept for evaluation (--filter=none). With
--service the retrieval service is asked, and no index is loaded here; the answers are the same. With --retriever=bm25
neighbours are the chunks that share most and rarest tokens, and neither embeddings nor index are needed.
"""

from absl import flags

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.program import beam_options, define_beam_flags, define_service_flags, run, service
from retro_jax.retrieval.bm25 import Bm25Settings
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.neighbours import FILTERS, find_neighbours

_CORPUS = flags.DEFINE_string("corpus", None, "corpus directory of the queries", required=True)
_EMBEDDINGS = flags.DEFINE_string("embeddings", None, "its embeddings; default: the database's own")
_DATABASE = flags.DEFINE_string("database", None, "directory with corpus/, embeddings/ and index/")
_OUTPUT = flags.DEFINE_string("output", None, "neighbours directory to write", required=True)
_K = flags.DEFINE_integer("k", 16, "neighbours kept of each chunk; keep more than training uses")
_FILTER = flags.DEFINE_enum("filter", "document", FILTERS, "hits to drop")
_DEDUPLICATE = flags.DEFINE_bool(
    "deduplicate", False, "drop neighbours whose text is that of a nearer one, among the 1,000 nearest"
)
_RETRIEVER = flags.DEFINE_enum("retriever", "dense", ("dense", "bm25"), "by vectors of an embedder, or by tokens")
_K1 = flags.DEFINE_float("k1", Bm25Settings.k1, "BM25: how soon repetition of a token stops to count")
_B = flags.DEFINE_float("b", Bm25Settings.b, "BM25: how much a chunk's length is discounted")
define_beam_flags()
define_service_flags(seconds=120)


def main() -> None:
    if _RETRIEVER.value == "dense" and _DATABASE.value is None and (service() is None or _EMBEDDINGS.value is None):
        raise UserError("give --database, or --service with --embeddings")
    manifest = find_neighbours(
        Corpus(_CORPUS.value),
        _DATABASE.value,
        _OUTPUT.value,
        k=_K.value,
        filter=_FILTER.value,
        deduplicate=_DEDUPLICATE.value,
        embeddings=None if _EMBEDDINGS.value is None else EmbeddingSet(_EMBEDDINGS.value),
        service=service(),
        bm25=Bm25Settings(_K1.value, _B.value) if _RETRIEVER.value == "bm25" else None,
        options=beam_options(),
    )
    counts = manifest.counts
    repeated = f", {counts['duplicates']:,} hits of the same text dropped" if _DEDUPLICATE.value else ""
    print(
        f"{_OUTPUT.value}: {counts['chunks']:,} chunks, {_K.value} neighbours each; {counts['fewer_than_k']:,} have "
        f"fewer, {counts['empty']:,} have no vector{repeated}"
    )


if __name__ == "__main__":
    run(main)
