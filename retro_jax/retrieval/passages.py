"""Passages for questions: the nearest chunks of a database, and how often the right one is among them.

A passage is a chunk of a database, as the blocks of 100 words of Wikipedia are for DPR (Karpukhin et al. 2020): the
database is built with --chunk_length so that a passage fits into a neighbour. Any database will do, and its documents
with `id` and `title`: the id is what a question names as its `passage_id`, however many chunks the document has.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from retro_jax.data.answers import contains_answer
from retro_jax.data.questions import PARTS, Passage, Question, part_of, read_questions
from retro_jax.data.stage import Manifest, Stage
from retro_jax.errors import UserError, require
from retro_jax.files import file_sha256
from retro_jax.progress import Progress
from retro_jax.retrieval.bm25 import Bm25
from retro_jax.retrieval.database import Database
from retro_jax.retrieval.segments import DatabaseCorpus

RECALL_AT = (1, 2, 5, 10, 20, 50, 100)
_QUESTIONS_AT_ONCE = 256


class PassageFinder(Protocol):
    """A search of a database by text.

    Attributes:
      corpus: the database's chunks.
      settings: what the answers depend on besides the database, JSON-serialisable.
      fingerprint: of the database.
    """

    corpus: DatabaseCorpus
    settings: dict[str, Any]
    fingerprint: str

    def find(self, texts: Sequence[str], k: int) -> np.ndarray:
        """int64 [n, k] chunk ids, the best first, -1 for none."""


class DenseFinder:
    """By the vectors of the database's own embedder."""

    def __init__(self, database: Database) -> None:
        """`database`: opened with its embedder."""
        if database.embedder is None:
            raise UserError("dense retrieval needs the embedder that the database was embedded with")
        self.corpus, self.fingerprint = database.corpus, database.fingerprint
        self.settings = {"retriever": "dense", "embedder": database.embedder_fingerprint}
        self._database, self._embedder = database, database.embedder

    def find(self, texts: Sequence[str], k: int) -> np.ndarray:
        return self._database.search(self._embedder.embed(texts).vectors, k)[0]


class Bm25Finder:
    """By the tokens in common."""

    def __init__(self, bm25: Bm25) -> None:
        self.corpus, self.fingerprint = bm25.corpus, bm25.fingerprint
        self.settings = {"retriever": "bm25", **dataclasses.asdict(bm25.settings)}
        self._bm25 = bm25

    def find(self, texts: Sequence[str], k: int) -> np.ndarray:
        rows = [self.corpus.tokenizer.encode(text) for text in texts]
        queries = np.full((len(rows), max(map(len, rows))), self.corpus.pad_id, np.int32)
        for query, tokens in zip(queries, rows, strict=True):
            query[: len(tokens)] = tokens
        return self._bm25.search(queries, k)[0]


def retrieve_passages(
    questions: str | os.PathLike,
    finder: PassageFinder,
    directory: str | os.PathLike,
    *,
    k: int,
    continuation: bool = False,
    dev_share: float = 0.0,
    test_share: float = 0.0,
) -> Manifest:
    """Writes questions with their passages, one file a part: `train.jsonl`, `dev.jsonl`, `test.jsonl`.

    The manifest counts the questions of each part, and its recall at some numbers of passages (see `recall`).

    Args:
      questions: file that `read_questions` reads, without passages.
      finder: of passages.
      directory: what is written; parts without questions are left out.
      k: passages of a question.
      continuation: a passage is a chunk with its continuation, as a neighbour is, and not the chunk alone.
      dev_share, test_share: of the articles, see `part_of`.

    Raises:
      UserError: questions that cannot be read, shares that cannot be, or the directory holds something else.
    """
    require(k >= 1, f"k must be at least 1, is {k}")
    shares = f"dev_share {dev_share} and test_share {test_share}"
    require(min(dev_share, test_share) >= 0 and dev_share + test_share <= 1, f"{shares} must add up to at most 1")
    settings = {
        **finder.settings,
        "k": k,
        "continuation": continuation,
        "dev_share": dev_share,
        "test_share": test_share,
    }
    inputs = {"questions": file_sha256(questions)[:16], "database": finder.fingerprint}
    with Stage(directory, "questions", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        answered = with_passages(list(read_questions(questions, passages=False)), finder, k, continuation)
        parts: dict[str, list[Question]] = {part: [] for part in PARTS}
        for question in answered:
            parts[part_of(question, dev_share=dev_share, test_share=test_share)].append(question)
        counts: dict[str, Any] = {}
        for part, chosen in parts.items():
            if not chosen:
                continue
            with stage.shard(part_file(part)) as (path, own), open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(question.as_json(), ensure_ascii=False) + "\n" for question in chosen)
                own["questions"] = len(chosen)
            counts[part] = {"questions": len(chosen), "recall": recall(chosen, k)}
        return stage.finish(counts)


def part_file(part: str) -> str:
    """Name of the file of a part."""
    return f"{part}.jsonl"


def with_passages(
    questions: Sequence[Question], finder: PassageFinder, k: int, continuation: bool = False
) -> list[Question]:
    """The questions with their k passages, the best first; fewer where fewer are found."""
    corpus = finder.corpus
    document = functools.cache(corpus.document)
    read = corpus.neighbour_tokens if continuation else corpus.tokens

    def passage(chunk: int, number: int) -> Passage:
        record = document(number)
        # A character that the chunk's border cuts in two shows as U+FFFD there.
        text = corpus.tokenizer.decode(read(chunk)).strip("\ufffd").strip()
        return Passage(record.metadata.get("title", ""), text, record.id)

    found = []
    with Progress("passages", total=len(questions), unit="questions") as progress:
        for first in range(0, len(questions), _QUESTIONS_AT_ONCE):
            some = questions[first : first + _QUESTIONS_AT_ONCE]
            ids = finder.find([question.question for question in some], k)
            for question, chunks in zip(some, ids, strict=True):
                chunks = chunks[chunks >= 0]
                documents = corpus.document_index(chunks)
                passages = map(passage, chunks.tolist(), documents.tolist())
                found.append(dataclasses.replace(question, passages=tuple(passages)))
            progress.update(len(some))
    return found


def recall(questions: Sequence[Question], k: int) -> dict[str, dict[str, float | None]]:
    """Recall@n: for "1", "2", … up to k, the share of the questions that find what they need among n passages.

    "passage": the one with the question's `passage_id`, of the questions that name one; None where none does. "answer":
    one in which an answer stands, by chance too.
    """
    named = np.array([bool(question.passage_id) for question in questions])
    gold = np.array([_rank([p.id == q.passage_id for p in q.passages]) for q in questions])
    right = np.array([_rank([contains_answer(p.text, q.answers) for p in q.passages]) for q in questions])
    return {
        str(n): {
            "passage": float((gold[named] < n).mean()) if named.any() else None,
            "answer": float((right < n).mean()),
        }
        for n in sorted({*(n for n in RECALL_AT if n < k), k})
    }


def _rank(hits: Sequence[bool]) -> float:
    """Of the first hit, from 0; infinite for none."""
    return next((float(rank) for rank, hit in enumerate(hits) if hit), float("inf"))
