"""Embeds every chunk of a corpus with a frozen BERT, on all devices of all hosts; run again it goes on.

    python tools/embed_chunks.py --corpus=DB/corpus --embedder=embedder --output=DB/embeddings

On several hosts start it on each; they share the shards of the corpus (--coordinator, --num_processes, --process_id, or
what TPU pods and SLURM say). The database and every corpus that queries it need the same embedder and settings.
"""

import os

from absl import flags

from retro_jax.data.corpus import Corpus
from retro_jax.parallel import hosts
from retro_jax.program import define_cluster_flags, run, start_cluster
from retro_jax.retrieval.embedder import COMPUTE_DTYPES, Embedder, embed_corpus

_CORPUS = flags.DEFINE_string("corpus", None, "corpus directory", required=True)
_EMBEDDER = flags.DEFINE_string(
    "embedder", None, "BERT checkpoint: a directory or a Hugging Face hub id", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "embeddings directory to write", required=True)
_NORMALIZE = flags.DEFINE_bool(
    "normalize", False, "scale vectors to length 1, for checkpoints trained with cosine similarity (the paper does not)"
)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 256, "word pieces read of a chunk at most, with [CLS] and [SEP]")
_COMPUTE_DTYPE = flags.DEFINE_enum(
    "compute_dtype", "float32", COMPUTE_DTYPES, "type of the products; bfloat16 is quicker where the hardware has it"
)
define_cluster_flags()


def main() -> None:
    start_cluster()
    corpus = Corpus(_CORPUS.value)
    embedder = Embedder.load(
        _EMBEDDER.value,
        normalize=_NORMALIZE.value,
        max_length=_MAX_LENGTH.value,
        compute_dtype=_COMPUTE_DTYPE.value,
    )
    counts = embed_corpus(corpus, embedder, _OUTPUT.value).counts
    if not hosts.is_primary():
        return
    print(
        f"{_OUTPUT.value}: {counts['chunks']:,} chunks as vectors of {embedder.dimension}; {counts['empty']:,} without "
        f"a word piece, {counts['cut']:,} cut at {_MAX_LENGTH.value} word pieces; embedder {embedder.fingerprint}"
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow only splits strings here; spare its banner
    run(main)
