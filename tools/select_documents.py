"""Chooses documents: a smaller corpus out of a larger one, the same one on every machine.

    python tools/select_documents.py --input='corpus/train-*.jsonl.gz' --languages=en --bytes=20000000 \\
        --always=corpus/redundant.jsonl.gz --output=train.jsonl

Documents come in the order of a hash of their id. With --bytes each next one is of the source that has the fewest bytes
so far, until there are so many bytes; so all sources that have enough get equal shares. With --files=9 they are dealt
to train-00000-of-00009.jsonl and so on: one file is what the later stages finish at a time.
"""

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.data.stage import shard_name
from retro_jax.data.text import Document, expand_inputs, read_documents, read_lines
from retro_jax.errors import UserError
from retro_jax.files import atomic_write

_INPUT = flags.DEFINE_list("input", None, "Files of documents; glob patterns are expanded.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The chosen documents (.jsonl).", required=True)
_BYTES = flags.DEFINE_integer("bytes", None, "About so many bytes of text; all by default.", lower_bound=1)
_LANGUAGES = flags.DEFINE_list("languages", ["*"], "Patterns of languages to choose from.")
_DOMAINS = flags.DEFINE_list("domains", ["*"], "Patterns of domains to choose from.")
_MAX_CHARACTERS = flags.DEFINE_integer(
    "max_characters", None, "Longer documents end with the last paragraph before this.", lower_bound=100
)
_ALWAYS = flags.DEFINE_list("always", [], "Files of JSON lines whose `train_id`s are chosen in any case.")
_FILES = flags.DEFINE_integer("files", 1, "Files to deal the documents to, numbered.", lower_bound=1)


def main() -> None:
    naming = expand_inputs(_ALWAYS.value) if _ALWAYS.value else []
    always = {name for path in naming for name in _named(path)}
    documents = []
    for document in read_documents(expand_inputs(_INPUT.value)):
        wanted = _matches(document, "language", _LANGUAGES.value) and _matches(document, "domain", _DOMAINS.value)
        if wanted or document.id in always:
            documents.append(document)
    missing = always - {document.id for document in documents}
    if missing:
        raise UserError(f"--always: {len(missing)} documents are not in --input, {sorted(missing)[0]!r} for one")
    if not documents:
        raise UserError(f"--input: no document of these languages and domains in {', '.join(_INPUT.value)}")
    texts = {document.id: _shortened(document.text) for document in documents}
    chosen = choose(documents, {name: len(text.encode()) for name, text in texts.items()}, always, _BYTES.value)
    path, count = Path(_OUTPUT.value), _FILES.value
    for number in range(count):
        name = path.name if count == 1 else shard_name(path.stem, number, count, path.suffix)
        with atomic_write(path.with_name(name)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for one in chosen[number::count]:
                row = {"id": one.id, "group": one.group, **one.metadata, "text": texts[one.id]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    files = f" in {count} files" if count > 1 else ""
    print(f"{path}: {len(chosen):,} documents, {sum(len(texts[one.id].encode()) for one in chosen):,} bytes{files}")


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
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            name = json.loads(line)["train_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = None
        if not isinstance(name, str):
            raise UserError(f"{path}:{number}: not an object with a train_id")
        yield name


if __name__ == "__main__":
    program.run(main)
