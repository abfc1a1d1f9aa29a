"""Questions with their answers and the passages that were retrieved for them, in Fusion-in-Decoder's format.

JSON lines, or one JSON list (Izacard and Grave 2021), plain or gzipped; an object a question:

    question   the question
    answers    list of reference answers; may be missing where there is a target
    target     the answer to train on; where there is none, one of the answers is drawn
    ctxs       list of passages, the best first, each {"title": …, "text": …}; fewer than are read is allowed
    id, title, passage_id   optional: a name; the article and the passage that hold the answer
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.text import read_lines
from retro_jax.errors import UserError

PARTS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True)
class Passage:
    """A retrieved text.

    Attributes:
      title, text: what is read.
      id: of the passage that it is part of, as `Question.passage_id`; empty where nobody knows.
    """

    title: str
    text: str
    id: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question; the fields are those of the format above.

    Attributes:
      answers: at least one.
      target: None where one of the answers is to be drawn.
      passages: `ctxs`.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    target: str | None = None
    passages: tuple[Passage, ...] = ()
    title: str = ""
    passage_id: str = ""

    def training_answer(self, seed: int, number: int) -> str:
        """The target, or the answer that `seed` draws for question `number`."""
        if self.target is not None:
            return self.target
        return self.answers[np.random.default_rng([seed, number]).integers(len(self.answers))]

    def as_json(self) -> dict[str, Any]:
        """An object of the format."""
        row: dict[str, Any] = {"id": self.id, "question": self.question, "answers": list(self.answers)}
        if self.target is not None:
            row["target"] = self.target
        row |= {name: value for name in ("title", "passage_id") if (value := getattr(self, name))}
        row["ctxs"] = [dataclasses.asdict(passage) for passage in self.passages]
        return row


def read_questions(path: str | os.PathLike, *, passages: bool = True) -> Iterator[Question]:
    """Gives the questions of a file in order; JSON lines are held one at a time.

    Args:
      path: .json, .jsonl, and either with .gz or .zst.
      passages: `ctxs` is required; without, it is not looked at.

    Raises:
      UserError: naming file and line or place in the list: no such file, a damaged compressed one, not JSON, a field
        missing or of another kind, an empty question, no answer; or no question in the file.
    """
    path, number = Path(path), -1
    for number, (place, row) in enumerate(_rows(path)):
        try:
            yield _question(row, str(number), passages)
        except _BadQuestionError as error:
            raise UserError(f"{path}{place}: {error}") from None
    if number < 0:
        raise UserError(f"{path}: there is no question in it")


def part_of(question: Question, *, dev_share: float, test_share: float) -> str:
    """The one of PARTS that a question belongs to; questions about one article are in one part.

    A hash of the article's title (else of the passage's id, else of the question) is a number in [0, 1): below
    `test_share` the part is "test", below `test_share + dev_share` it is "dev", else "train". So the part depends on
    nothing else, in whichever language or file the question stands.
    """
    key = question.title or question.passage_id or question.question
    number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    if number < test_share:
        return "test"
    return "dev" if number < test_share + dev_share else "train"


def some_of(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` of the questions in their order, from all over them: those with the smallest hash of id and text.

    A file has the questions about one article one after the other, so its first ones would be about few.
    """
    keys = [blake2b(f"{each.id}\n{each.question}".encode(), digest_size=8).digest() for each in questions]
    return [questions[place] for place in sorted(sorted(range(len(keys)), key=keys.__getitem__)[:count])]


class _BadQuestionError(Exception):
    """What is wrong with a question."""


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place, for messages, and value of every question."""
    lines = read_lines(path)
    for number, line in lines:
        if number == 1 and line.lstrip()[:1] == b"[":
            rows = _parsed(line + b"".join(rest for _, rest in lines), f"{path}")
            yield from ((f": question {place}", row) for place, row in enumerate(rows, start=1))
        elif line.strip():
            yield f":{number}", _parsed(line, f"{path}:{number}")


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({' '.join(str(error).split())})") from None


def _question(row: Any, number: str, passages: bool) -> Question:
    if not isinstance(row, dict):
        raise _BadQuestionError("expected an object with question, answers and ctxs")
    question = _text(row, "question")
    if not question.strip():
        raise _BadQuestionError("the question is empty")
    target = _text(row, "target") if row.get("target") is not None else None
    answers = row.get("answers", [] if target is None else [target])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise _BadQuestionError("answers is not a list of strings")
    answers = [_characters(answer, "answers") for answer in answers or ([] if target is None else [target])]
    answers = [answer for answer in answers if answer.strip()]
    if not answers or (target is not None and not target.strip()):
        raise _BadQuestionError("there is no answer")
    found: list[Passage] = []
    if passages:
        if not isinstance(row.get("ctxs"), list):
            raise _BadQuestionError("ctxs is missing or not a list; tools/retrieve_passages.py finds passages")
        found = [_passage(each, rank) for rank, each in enumerate(row["ctxs"], start=1)]
    names = {name: _name(row, name) for name in ("title", "passage_id")}
    return Question(_name(row, "id", number), question, tuple(answers), target, tuple(found), **names)


def _passage(row: Any, rank: int) -> Passage:
    if not isinstance(row, dict):
        raise _BadQuestionError(f"passage {rank} of ctxs is no object")
    try:
        return Passage(_text(row, "title"), _text(row, "text"), _name(row, "id"))
    except _BadQuestionError as error:
        raise _BadQuestionError(f"passage {rank} of ctxs: {error}") from None


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _BadQuestionError(f"{name} is {'missing' if name not in row else 'not a string'}")
    return _characters(value, name)


def _name(row: dict[str, Any], name: str, default: str = "") -> str:
    """What may be missing, and may be a number."""
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, str | int | float):
        raise _BadQuestionError(f"{name} is neither a string nor a number")
    return _characters(str(value), name)


def _characters(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadQuestionError(f"{name} holds a lone surrogate, which is no character") from None
    return value
