"""Turns what evaluation sets are distributed as into documents, or cuts a smaller set out of a larger one.

    python tools/make_evaluation_text.py --kind=wikitext --input=wiki.valid.raw --output=wikitext.jsonl
    python tools/make_evaluation_text.py --kind=lambada --input=lambada_test.jsonl --output=lambada.jsonl
    python tools/make_evaluation_text.py --kind=questions --input=questions.jsonl --output=questions.jsonl
    python tools/make_evaluation_text.py --kind=documents --input='valid-*.jsonl.gz' --documents=100 \\
        --max_characters=20000 --output=valid.jsonl

Kinds of input:
  documents   what tools/build_corpus.py reads; it stays as it is
  wikitext    a file of WikiText: its articles as writers set them, with "words", the words of the original
  lambada     {"text": ...} a line: the last word becomes the document's "completion"
  questions   {"prompt": ..., "answer": ...} a line: the document is both, the answer its "completion"
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.data.stage import atomic_write
from retro_jax.data.text import expand_inputs, read_documents
from retro_jax.errors import UserError
from retro_jax.evaluation.wikitext import articles

KINDS = ("documents", "wikitext", "lambada", "questions")

_INPUT = flags.DEFINE_list("input", None, "Files; glob patterns are expanded.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The documents (.jsonl).", required=True)
_KIND = flags.DEFINE_enum("kind", "documents", KINDS, "What the input is.")
_DOCUMENTS = flags.DEFINE_integer(
    "documents", None, "Keep so many, chosen by a hash of their id, of each source alike.", lower_bound=1
)
_MAX_CHARACTERS = flags.DEFINE_integer(
    "max_characters", None, "Cut longer documents at the last paragraph before this.", lower_bound=100
)


def main() -> None:
    rows = list(_rows(expand_inputs(_INPUT.value) if _KIND.value in ("documents", "lambada") else _INPUT.value))
    if _DOCUMENTS.value:
        rows = sample(rows, _DOCUMENTS.value)
    if _MAX_CHARACTERS.value:
        cut = [row for row in rows if len(row["text"]) > _MAX_CHARACTERS.value]
        if any("words" in row or "completion" in row for row in cut):
            raise UserError("--max_characters: a text with words or a completion must stay whole; leave it out")
        for row in cut:
            row["text"] = shorten(row["text"], _MAX_CHARACTERS.value)
    path = Path(_OUTPUT.value)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} documents, {sum(len(row['text'].encode()) for row in rows):,} bytes")


def sample(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many documents, in their order, as evenly from all sources as these allow; the same ones on every machine."""
    by_source: dict[str, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda place: hashlib.sha256(rows[place]["id"].encode()).digest()):
        by_source.setdefault(rows[place].get("source", ""), []).append(place)
    chosen: list[int] = []
    while len(chosen) < min(count, len(rows)):
        for source in sorted(by_source):
            if by_source[source] and len(chosen) < count:
                chosen.append(by_source[source].pop(0))
    return [rows[place] for place in sorted(chosen)]


def shorten(text: str, most: int) -> str:
    """The beginning of a text, at most so many characters, up to the end of a paragraph, a line or a word."""
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, most // 2, most)
        if end > 0:
            return text[:end]
    return text[:most]


def _rows(paths: list[Any]) -> Iterator[dict[str, Any]]:
    if _KIND.value in ("documents", "lambada"):
        for document in read_documents(paths):
            row = {"id": document.id, "group": document.group, **document.metadata, "text": document.text}
            if _KIND.value == "lambada":
                words = document.text.split()
                row |= {"text": document.text.rstrip(), "completion": words[-1]}
            yield row
    elif _KIND.value == "wikitext":
        for path in paths:
            with open(path, encoding="utf-8") as file:
                for number, article in enumerate(articles(file)):
                    yield {"id": f"{Path(path).name}-{number:04d}", "source": "wikitext", **dataclasses.asdict(article)}
    else:
        for path in paths:
            with open(path, encoding="utf-8") as file:
                for row in map(json.loads, file):
                    text = f"{row['prompt']} {row['answer']}"
                    yield {"id": row["id"], "text": text, "completion": row["answer"]}


if __name__ == "__main__":
    program.run(main)
