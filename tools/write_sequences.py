"""Writes training sequences with their neighbours, in random order, as TFRecords.

    python tools/write_sequences.py --corpus=DB/corpus --neighbours=X/neighbours --database=DB \
        --output=X/sequences --length=2048 --k=2

Run again after an interruption, it writes the shards that are not finished. Chunks of documents that were removed from
the database since the neighbours were found are neighbours no more; the text that is trained on is the corpus's all the
same, and documents of it that the database has lost are counted: to leave them out, build a corpus without them.
"""

from absl import flags

from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import PACKINGS, write_sequences
from retro_jax.program import beam_options, define_beam_flags, run
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.segments import DatabaseCorpus

_CORPUS = flags.DEFINE_string("corpus", None, "corpus to train on (tools/build_corpus.py)", required=True)
_NEIGHBOURS = flags.DEFINE_string("neighbours", None, "its neighbours (tools/find_neighbours.py)", required=True)
_DATABASE = flags.DEFINE_string("database", None, "database they were found in (holds corpus/)", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", required=True)
_LENGTH = flags.DEFINE_integer("length", 2048, "tokens of a sequence, a multiple of the chunk length", lower_bound=1)
_K = flags.DEFINE_integer("k", 2, "neighbours of a chunk", lower_bound=1)
_PACKING = flags.DEFINE_enum(
    "packing", "document", PACKINGS, "document: one document a sequence, padded; packed: consecutive chunks"
)
_SHARD_RECORDS = flags.DEFINE_integer("shard_records", 8192, "sequences of a file", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the order", lower_bound=0)
define_beam_flags()


def main() -> None:
    corpus, database = Corpus(_CORPUS.value), DatabaseCorpus(_DATABASE.value)
    counts = write_sequences(
        corpus,
        NeighbourTable(_NEIGHBOURS.value),
        database,
        _OUTPUT.value,
        length=_LENGTH.value,
        k=_K.value,
        packing=_PACKING.value,
        shard_records=_SHARD_RECORDS.value,
        seed=_SEED.value,
        removed=database.segments.removed,
        options=beam_options(),
    ).counts
    padding = counts["padding_tokens"] / (counts["sequences"] * _LENGTH.value)
    short = counts["chunks"] - counts["chunks_by_neighbours"][-1]
    lost = database.removed_documents(corpus)
    trained = f"; {lost:,} documents in it were removed from {_DATABASE.value}" if lost else ""
    print(
        f"{_OUTPUT.value}: {counts['sequences']:,} sequences of {_LENGTH.value:,} tokens ({padding:.1%} padding), "
        f"{counts['bytes']:,} bytes of text, {short:,} of {counts['chunks']:,} chunks "
        f"with fewer than {_K.value} neighbours{trained}"
    )


if __name__ == "__main__":
    run(main)
