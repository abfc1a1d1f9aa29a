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

Files may be compressed (.gz, .zst).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.data.text import read_lines
from retro_jax.errors import UserError
from retro_jax.evaluation.wikitext import articles
from retro_jax.files import atomic_write

# Fields of a line of each kind, and what makes a document of them.
LINES = {
    "lambada": (("text",), lambda text: (text.rstrip(), text.split()[-1])),
    "questions": (("prompt", "answer"), lambda prompt, answer: (f"{prompt} {answer}", answer)),
    "summaries": (("article", "summary"), lambda article, summary: (f"{article}\n\nTL;DR: {summary}", summary)),
}

_INPUT = flags.DEFINE_list("input", None, "The file, or several with commas.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The documents (.jsonl).", required=True)
_KIND = flags.DEFINE_enum("kind", None, ["wikitext", *LINES], "What the input is.", required=True)
_DOCUMENTS = flags.DEFINE_integer("documents", None, "Keep so many, chosen by a hash of their id.", lower_bound=1)


def main() -> None:
    read = _articles if _KIND.value == "wikitext" else _lines
    rows = [row for name in _INPUT.value for row in read(Path(name))]
    if _DOCUMENTS.value:
        kept = {row["id"] for row in sorted(rows, key=_digest)[: _DOCUMENTS.value]}
        rows = [row for row in rows if row["id"] in kept]
    path = Path(_OUTPUT.value)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} documents, {sum(len(row['text'].encode()) for row in rows):,} bytes")


def _articles(path: Path) -> Iterator[dict[str, Any]]:
    for number, article in enumerate(articles(_decoded(path))):
        yield {"id": f"{_stem(path)}-{number:04d}", "source": "wikitext", **dataclasses.asdict(article)}


def _decoded(path: Path) -> Iterator[str]:
    for number, line in read_lines(path):
        try:
            yield line.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    names, compose = LINES[_KIND.value]
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            parts = [row[name] for name in names]
        except (ValueError, KeyError, TypeError, RecursionError):
            parts = [None]
        if not all(map(_is_text, parts)):
            raise UserError(f"{path}:{number}: not an object with text in {' and '.join(names)}")
        identity = row.get("id", f"{_stem(path)}:{number}")
        if not _is_text(identity) and type(identity) is not int:
            raise UserError(f'{path}:{number}: "id" is neither a string nor a whole number')
        text, completion = compose(*parts)
        yield {"id": str(identity), "source": _KIND.value, "text": text, "completion": completion}


def _is_text(value: object) -> bool:
    """Whether it is a string of characters, not of white space or lone surrogates."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= one <= "\udfff" for one in value)


def _stem(path: Path) -> str:
    """The name of a file without its last suffix, compressed or not."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).stem


def _digest(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(row["id"].encode()).digest()


if __name__ == "__main__":
    program.run(main)
