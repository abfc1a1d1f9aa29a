"""Questions to rows of tokens: the prompt ends with a chunk, its passages are that chunk's neighbours (paper App. C.4).

    decoder     PAD … PAD BOS question: … \\n answer: | answer EOS PAD … PAD
    passages    title: …, source: …                          each cut to R tokens

The prompt is padded on the left to P tokens, a multiple of M, so "answer:" ends exactly where its last chunk ends: that
token attends to the passages and predicts the answer's first token, and the answer lies in the chunk that attends to
them. A prompt that is too long loses its beginning. Passages may also stand in the prompt, the best one last, next to
the question: one of them and the others as neighbours is RETRO++ (Wang et al. 2023); all of them, and no neighbours, is
how a decoder alone reads them, in place of Fusion-in-Decoder's own encoder for each.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_jax.data.corpus import TOKENIZER_FILE
from retro_jax.data.questions import Passage, Question, read_questions
from retro_jax.data.records import SequenceSchema
from retro_jax.data.stage import Manifest, Stage, load_manifest, shard_name
from retro_jax.data.tfrecord import RecordWriter
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import require
from retro_jax.files import file_sha256
from retro_jax.progress import Progress

_PASSAGES_KEPT = 100_000
_TOTALS = ("sequences", "chunks", "tokens", "bytes", "cut_prompts", "cut_answers", "passages_in_prompts")


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a question and its passages are laid out.

    Attributes:
      prompt_chunks: chunks of the prompt; P is so many times M.
      passages: K, passages that are neighbours of the prompt's last chunk; 0 for none.
      passages_in_prompt: the best so many stand in the prompt instead, as far as they fit.
      chunk_length: M.
      neighbour_length: R, tokens of a passage.
    """

    prompt_chunks: int = 1
    passages: int = 20
    passages_in_prompt: int = 0
    chunk_length: int = 64
    neighbour_length: int = 128

    def __post_init__(self) -> None:
        for name, least in (("prompt_chunks", 1), ("chunk_length", 2), ("neighbour_length", 1)):
            require(getattr(self, name) >= least, f"{name} must be at least {least}, is {getattr(self, name)}")
        for name in ("passages", "passages_in_prompt"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, is {getattr(self, name)}")

    @property
    def prompt_length(self) -> int:
        """P, tokens of the prompt with its padding."""
        return self.prompt_chunks * self.chunk_length

    def schema(self, vocab_size: int) -> SequenceSchema:
        """Shapes of the training sequences: the prompt and a chunk for the answer; K is 1 where nothing is read."""
        return SequenceSchema(
            self.prompt_length + self.chunk_length,
            self.chunk_length,
            max(self.passages, 1),
            self.neighbour_length,
            vocab_size,
        )


class RowWriter:
    """Makes rows with one tokenizer and layout."""

    def __init__(self, tokenizer: Tokenizer, layout: RowLayout) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self._separator = tokenizer.encode(" \n ")
        # Questions about one article have many passages in common.
        self._passage = functools.lru_cache(_PASSAGES_KEPT)(self._passage_tokens)

    def prompt(self, question: Question) -> list[int]:
        """Tokens of the prompt without start token and padding, at most P - 1; the last one ends "answer:".

        Passages in the prompt take what the question leaves: the best one is cut to R tokens and to the room there is,
        then the next one comes before it. The first that does not fit whole is cut, and the others are left out.
        """
        passages: list[int] = []
        for passage in reversed(self.passages_in_prompt(question)):
            passages += passage + self._separator
        return passages + self._question(question)[1 - self.layout.prompt_length :]

    def passages_in_prompt(self, question: Question) -> list[list[int]]:
        """Tokens of the passages that stand in the prompt, the best first; the last one may be cut."""
        room = self.layout.prompt_length - 1 - len(self._question(question))
        found: list[list[int]] = []
        for passage in question.passages[: self.layout.passages_in_prompt]:
            text = self._passage(passage)
            fits = text[: max(room - len(self._separator), 0)]
            if fits:
                found.append(fits)
                room -= len(fits) + len(self._separator)
            if len(fits) < len(text):
                break
        return found

    def is_cut(self, question: Question) -> bool:
        """Whether the question loses its beginning in the prompt."""
        return len(self._question(question)) >= self.layout.prompt_length

    def neighbours(self, question: Question) -> list[list[int]]:
        """Tokens of the passages that the encoder reads: at most K, of at most R tokens each."""
        first = self.layout.passages_in_prompt
        return [self._passage(passage) for passage in question.passages[first : first + self.layout.passages]]

    def answer(self, text: str) -> list[int]:
        """Tokens of an answer as they follow "answer:", without the end token."""
        return self.tokenizer.encode(f" {text.strip()}")

    def row(self, question: Question, answer: str) -> np.ndarray:
        """int32 [T + 1]: padding, start token, prompt; from P on the answer and, if it fits into M, the end token."""
        layout, tokenizer = self.layout, self.tokenizer
        P, M = layout.prompt_length, layout.chunk_length
        row = np.full(P + M + 1, tokenizer.pad_id, np.int32)
        prompt = [tokenizer.bos_id, *self.prompt(question)]
        row[P - len(prompt) : P] = prompt
        completion = [*self.answer(answer), tokenizer.eos_id][:M]
        row[P : P + len(completion)] = completion
        return row

    def neighbour_rows(self, question: Question) -> np.ndarray:
        """int32 [K, R], K at least 1: what `neighbours` gives, PAD behind it and for passages that are missing."""
        rows = np.full((max(self.layout.passages, 1), self.layout.neighbour_length), self.tokenizer.pad_id, np.int32)
        for rank, tokens in enumerate(self.neighbours(question)):
            rows[rank, : len(tokens)] = tokens
        return rows

    def _question(self, question: Question) -> list[int]:
        return self.tokenizer.encode(f"question: {question.question} \n answer:")

    def _passage_tokens(self, passage: Passage) -> list[int]:
        text = f"title: {passage.title}, source: {passage.text}"
        return self.tokenizer.encode(text)[: self.layout.neighbour_length]


def write_answers(
    examples: str | os.PathLike,
    tokenizer: Tokenizer,
    directory: str | os.PathLike,
    layout: RowLayout,
    *,
    seed: int = 0,
    shard_records: int = 8192,
) -> Manifest:
    """Writes questions with their answers as training sequences, in the order of the file; goes on where it stopped.

    It is the sequences stage (`sequences.py`) with a `prompt_length`: training puts no loss on the prompt. The file is
    read twice, a shard of questions at a time.

    Args:
      examples: file of questions with passages.
      tokenizer: that of the model that is fine-tuned.
      directory: what is written.
      layout: of the rows.
      seed: draws the answer of a question without a target.
      shard_records: questions of a shard.

    Raises:
      UserError: a question that cannot be read, or settings that cannot be.
    """
    require(shard_records >= 1, f"shard_records must be at least 1, is {shard_records}")
    require(seed >= 0, f"the seed must not be negative, is {seed}")
    total = sum(1 for _ in read_questions(examples))
    schema = layout.schema(tokenizer.vocab_size)
    settings = {
        "schema": dataclasses.asdict(schema),
        "prompt_length": layout.prompt_length,
        "layout": dataclasses.asdict(layout),
        "shard_records": shard_records,
        "seed": seed,
    }
    inputs = {"tokenizer": tokenizer.fingerprint, "examples": file_sha256(examples)[:16]}
    with Stage(directory, "sequences", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        shards = -(-total // shard_records)
        names = [shard_name("sequences", i, shards, ".tfrecord") for i in range(shards)]
        writer, questions = RowWriter(tokenizer, layout), read_questions(examples)
        with Progress("sequences", total=total, unit="questions") as progress:
            for shard, name in enumerate(names):
                numbers = range(shard * shard_records, min((shard + 1) * shard_records, total))
                chosen = [next(questions) for _ in numbers]
                if not stage.has(name):
                    with stage.shard(name) as (path, counts), RecordWriter(path) as records:
                        counts.update(_write_shard(records, writer, schema, chosen, numbers, seed))
                progress.update(len(numbers))
        counts = {key: sum(stage.counts(name)[key] for name in names) for key in _TOTALS}
        histograms = [stage.counts(name)["questions_by_passages"] for name in names]
        counts["questions_by_passages"] = np.sum(histograms, axis=0).tolist()
        counts["padding_tokens"] = counts["sequences"] * schema.length - counts["tokens"]
        with stage.shard(TOKENIZER_FILE) as (path, _):
            shutil.copyfile(tokenizer.path, path)
        return stage.finish(counts)


def stored_layout(directory: str | os.PathLike) -> RowLayout | None:
    """The layout of sequences that `write_answers` wrote; None for those of other programs.

    Raises:
      UserError: no complete sequences there.
    """
    settings = load_manifest(Path(directory), "sequences", whole=False).settings
    return RowLayout(**settings["layout"]) if "layout" in settings else None


def _write_shard(
    records: RecordWriter,
    writer: RowWriter,
    schema: SequenceSchema,
    questions: Sequence[Question],
    numbers: Sequence[int],
    seed: int,
) -> dict[str, int | list[int]]:
    """Writes the records of some questions; gives what the shard counts."""
    totals = dict.fromkeys(_TOTALS, 0)
    histogram = np.zeros(writer.layout.passages + 1, np.int64)
    L, K = schema.chunks, schema.neighbours
    sizes, pad = writer.tokenizer.token_bytes, writer.tokenizer.pad_id
    for question, number in zip(questions, numbers, strict=True):
        answer = question.training_answer(seed, number)
        tokens, passages = writer.row(question, answer), writer.neighbour_rows(question)
        neighbours = np.full((L, K, schema.neighbour_length), pad, np.int32)
        neighbours[writer.layout.prompt_chunks - 1] = passages
        text = sizes[tokens[:-1]].reshape(L, -1).sum(axis=1)
        none = np.full(L, -1, np.int64)
        records.write(
            schema.encode(
                {
                    "bytes": text,
                    "chunks": none,
                    "distances": np.full((L, K), np.inf, np.float32),
                    "document_keys": none,
                    "documents": none,
                    "neighbour_ids": np.full((L, K), -1, np.int64),
                    "neighbours": neighbours,
                    "tokens": tokens,
                }
            )
        )
        used = (tokens[:-1] != pad).reshape(L, -1)
        totals["sequences"] += 1
        totals["chunks"] += int(used.any(axis=1).sum())
        totals["tokens"] += int(used.sum())
        totals["bytes"] += int(text.sum())
        totals["cut_prompts"] += writer.is_cut(question)
        totals["passages_in_prompts"] += len(writer.passages_in_prompt(question))
        totals["cut_answers"] += len(writer.answer(answer)) >= schema.chunk_length
        histogram[(passages != pad).any(axis=1).sum()] += 1
    return {**totals, "questions_by_passages": histogram.tolist()}
