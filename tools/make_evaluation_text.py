"""Turns what evaluation sets are distributed as into documents.

    python tools/make_evaluation_text.py --kind=wikitext --input=wiki.valid.raw --output=wikitext/documents.jsonl
    python tools/make_evaluation_text.py --kind=lambada --input=lambada_test.jsonl --output=lambada/documents.jsonl
    python tools/make_evaluation_text.py --kind=questions --input=questions.jsonl --output=planted/documents.jsonl

Kinds of input:
  wikitext    a file of WikiText: its articles as writers set them, with "words", the words of the original
  lambada     {"text": ...} a line: the last word becomes the document's "completion"
  questions   {"prompt": ..., "answer": ...} a line: the document is both, the answer its "completion"
  summaries   {"article": ..., "summary": ...} a line: the summary is the "completion" and follows "TL;DR:", as the
              paper reads the Curation Corpus
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
from retro_jax.errors import UserError
from retro_jax.evaluation.wikitext import articles

# Fields of a line of each kind, and what makes a document of them.
LINES = {
    "lambada": (("text",), lambda text: (text.rstrip(), text.split()[-1])),
    "questions": (("prompt", "answer"), lambda prompt, answer: (f"{prompt} {answer}", answer)),
    "summaries": (("article", "summary"), lambda article, summary: (f"{article}\n\nTL;DR: {summary}", summary)),
}

_INPUT = flags.DEFINE_string("input", None, "The file.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The documents (.jsonl).", required=True)
_KIND = flags.DEFINE_enum("kind", None, ["wikitext", *LINES], "What the input is.", required=True)
_DOCUMENTS = flags.DEFINE_integer("documents", None, "Keep so many, chosen by a hash of their id.", lower_bound=1)


def main() -> None:
    source = Path(_INPUT.value)
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    with open(source, encoding="utf-8") as file:
        rows = list(_articles(source, file) if _KIND.value == "wikitext" else _lines(source, file))
    if _DOCUMENTS.value:
        kept = {row["id"] for row in sorted(rows, key=_digest)[: _DOCUMENTS.value]}
        rows = [row for row in rows if row["id"] in kept]
    path = Path(_OUTPUT.value)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} documents, {sum(len(row['text'].encode()) for row in rows):,} bytes")


def _articles(path: Path, file: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, article in enumerate(articles(file)):
        yield {"id": f"{path.stem}-{number:04d}", "source": "wikitext", **dataclasses.asdict(article)}


def _lines(path: Path, file: Iterator[str]) -> Iterator[dict[str, Any]]:
    names, compose = LINES[_KIND.value]
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line)
            text, completion = compose(*(row[name] for name in names))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path}:{number}: not an object with text in {' and '.join(names)}") from None
        identity = str(row.get("id", f"{path.stem}:{number}"))
        yield {"id": identity, "source": _KIND.value, "text": text, "completion": completion}


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(row["id"].encode()).digest()


if __name__ == "__main__":
    program.run(main)
