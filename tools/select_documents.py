"""Chooses documents: a smaller corpus out of a larger one, the same one on every machine.

    python tools/select_documents.py --input='corpus/train-*.jsonl.gz' --languages=en --bytes=20000000 \\
        --always=corpus/redundant.jsonl.gz --output=train.jsonl

Documents come in the order of a hash of their id. With --bytes each next one is of the source that has the fewest bytes
so far, until there are so many bytes; so all sources that have enough get equal shares.
"""

import fnmatch
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.data.stage import atomic_write
from retro_jax.data.text import Document, expand_inputs, read_documents
from retro_jax.errors import UserError

_INPUT = flags.DEFINE_list("input", None, "Files of documents; glob patterns are expanded.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The chosen documents (.jsonl).", required=True)
_BYTES = flags.DEFINE_integer("bytes", None, "About so many bytes of text; all by default.", lower_bound=1)
_LANGUAGES = flags.DEFINE_list("languages", ["*"], "Patterns of languages to choose from.")
_DOMAINS = flags.DEFINE_list("domains", ["*"], "Patterns of domains to choose from.")
_MAX_CHARACTERS = flags.DEFINE_integer(
    "max_characters", None, "Longer documents end with the last paragraph before this.", lower_bound=100
)
_ALWAYS = flags.DEFINE_string("always", None, "JSON lines whose `train_id`s are chosen in any case.")


def main() -> None:
    always = set(_named(Path(_ALWAYS.value))) if _ALWAYS.value else set()
    documents = []
    for document in read_documents(expand_inputs(_INPUT.value)):
        wanted = _matches(document, "language", _LANGUAGES.value) and _matches(document, "domain", _DOMAINS.value)
        if wanted or document.id in always:
            documents.append(document)
    missing = always - {document.id for document in documents}
    if missing:
        raise UserError(f"{_ALWAYS.value}: {len(missing)} documents are not in --input, {sorted(missing)[0]!r} for one")
    texts = {document.id: _shortened(document.text) for document in documents}
    chosen = choose(documents, {name: len(text.encode()) for name, text in texts.items()}, always, _BYTES.value)
    path = Path(_OUTPUT.value)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for one in chosen:
            row = {"id": one.id, "group": one.group, **one.metadata, "text": texts[one.id]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{path}: {len(chosen):,} documents, {sum(len(texts[one.id].encode()) for one in chosen):,} bytes")


def choose(
    documents: Sequence[Document], sizes: dict[str, int], always: set[str], budget: int | None
) -> list[Document]:
    """Documents in hash order, in turn from the source with the fewest bytes so far, until the budget is reached.

    Args:
      documents: all.
      sizes: id to bytes.
      always: ids that are chosen first.
      budget: bytes; None: all documents.
    """
    order = sorted(documents, key=lambda one: (one.id not in always, hashlib.sha256(one.id.encode()).digest()))
    if budget is None:
        return order
    queues: dict[str, list[Document]] = {}
    for document in reversed(order):
        queues.setdefault(document.metadata.get("source", ""), []).append(document)
    taken = dict.fromkeys(queues, 0)
    chosen = []
    while queues:
        named = [source for source in queues if queues[source][-1].id in always]
        if sum(taken.values()) >= budget and not named:
            break
        source = min(named or queues, key=lambda name: (taken[name], name))
        document = queues[source].pop()
        if not queues[source]:
            del queues[source]
        chosen.append(document)
        taken[source] += sizes[document.id]
    return chosen


def _matches(document: Document, key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(document.metadata.get(key, ""), pattern) for pattern in patterns)


def _shortened(text: str) -> str:
    most = _MAX_CHARACTERS.value
    if most is None or len(text) <= most:
        return text
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, most // 2, most)
        if end > 0:
            return text[:end]
    return text[:most]


def _named(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "train_id" not in row:
                raise UserError(f"{path}: a line has no train_id")
            yield row["train_id"]


if __name__ == "__main__":
    program.run(main)
