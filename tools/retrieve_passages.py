"""Finds passages for questions and writes both in Fusion-in-Decoder's format; tells how often the right one is found.

    python tools/build_corpus.py --input=passages.jsonl --tokenizer=RUN/tokenizer.model --chunk_length=112 \
        --output=passages/corpus
    python tools/retrieve_passages.py --questions=questions.jsonl --database=passages --retriever=bm25 \
        --output=questions
    python tools/retrieve_passages.py --questions=questions.jsonl --database=passages --embedder=embedder \
        --output=questions --dev_share=0.1 --test_share=0.2

Passages are the chunks of a database, whose documents have `id` and `title`. Questions are JSON lines with `question`
and `answers`, and `passage_id` (the id of the document with the answer) and `title` (of its article) where they are
known. The dense retriever needs embeddings/ and index/ of the database, BM25 its corpus/ alone.

The output holds train.jsonl, dev.jsonl and test.jsonl. Questions about one article go into one part: a hash of its
title decides, so no article of one part is asked about in another.
"""

from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.data.questions import PARTS
from retro_jax.errors import UserError
from retro_jax.retrieval.bm25 import Bm25, Bm25Settings
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet
from retro_jax.retrieval.passages import Bm25Finder, DenseFinder, PassageFinder, retrieve_passages

_QUESTIONS = flags.DEFINE_string("questions", None, "Questions: .json or .jsonl, also with .gz.", required=True)
_DATABASE = flags.DEFINE_string("database", None, "Database of the passages.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_RETRIEVER = flags.DEFINE_enum("retriever", "dense", ("dense", "bm25"), "By vectors of an embedder, or by tokens.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "Directory (or hub id) of the database's embedder, for dense.")
_K = flags.DEFINE_integer("k", 20, "Passages of a question.", lower_bound=1)
_CONTINUATION = flags.DEFINE_bool("continuation", False, "A passage is a chunk with its continuation.")
_DEV_SHARE = flags.DEFINE_float("dev_share", 0.0, "Share of the articles in dev.", lower_bound=0, upper_bound=1)
_TEST_SHARE = flags.DEFINE_float("test_share", 0.0, "Share of the articles in test.", lower_bound=0, upper_bound=1)
_K1 = flags.DEFINE_float("k1", Bm25Settings.k1, "BM25: how soon repetition of a token stops to count.")
_B = flags.DEFINE_float("b", Bm25Settings.b, "BM25: how much a chunk's length is discounted.")


def main() -> None:
    manifest = retrieve_passages(
        _QUESTIONS.value,
        _finder(),
        _OUTPUT.value,
        k=_K.value,
        continuation=_CONTINUATION.value,
        dev_share=_DEV_SHARE.value,
        test_share=_TEST_SHARE.value,
    )
    print("part   questions    k  gold passage  answer found")
    for part in (part for part in PARTS if part in manifest.counts):
        counts = manifest.counts[part]
        for n, found in sorted(counts["recall"].items(), key=lambda item: int(item[0])):
            gold = "-" if found["passage"] is None else f"{found['passage']:.1%}"
            print(f"{part:<5}  {counts['questions']:>9,}  {n:>3}  {gold:>12}  {found['answer']:>12.1%}")


def _finder() -> PassageFinder:
    if _RETRIEVER.value == "bm25":
        if _EMBEDDER.value:
            raise UserError("--embedder is of use only with --retriever=dense")
        return Bm25Finder(Bm25.open(_DATABASE.value, Bm25Settings(_K1.value, _B.value)))
    if not _EMBEDDER.value:
        raise UserError("--retriever=dense needs --embedder, the one the database was embedded with")
    settings = EmbeddingSet(Path(_DATABASE.value) / "embeddings").manifest.settings["embedder"]
    embedder = Embedder.load(_EMBEDDER.value, normalize=settings["normalize"], max_length=settings["max_length"])
    return DenseFinder(Database.open(_DATABASE.value, embedder))


if __name__ == "__main__":
    program.run(main)
