"""Makes the demo's four sets of documents from the sample: a small web in which most pages have an older copy.

    python tools/make_demo_text.py --input=experiments/sample/sample.jsonl --output=demo/text

Every document gets a second revision: half of its numbers are other numbers (figures are brought up to date) and a few
lines somewhere in its second half are gone. Then
  database.jsonl  first revisions of all documents but the new ones: what is retrieved from
  train.jsonl     both revisions of the training documents
  revised.jsonl   second revisions of documents whose first revision is in the database and which are not trained on
  new.jsonl       documents of which the database and the training set hold nothing
"""

import json
import random
import re
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.data.text import Document, read_documents
from retro_jax.errors import UserError
from retro_jax.files import atomic_write

_INPUT = flags.DEFINE_string("input", None, "documents (.jsonl)", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory for the four files", required=True)
_HELD_OUT = flags.DEFINE_integer("held_out", 5, "documents of each of the two evaluation sets", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "of the choice of documents and of the edits")


def main() -> None:
    documents = list(read_documents([Path(_INPUT.value)]))
    if len(documents) < 3 * _HELD_OUT.value:
        raise UserError(f"{_INPUT.value}: {len(documents)} documents are too few to hold out 2 x {_HELD_OUT.value}")
    generator = random.Random(_SEED.value)
    order = list(range(len(documents)))
    generator.shuffle(order)
    new, revised, train = (
        sorted(order[: _HELD_OUT.value]),
        sorted(order[_HELD_OUT.value : 2 * _HELD_OUT.value]),
        sorted(order[2 * _HELD_OUT.value :]),
    )
    second = {i: revise(documents[i].text, generator) for i in sorted(revised + train)}
    _write("database", [(documents[i], 1, documents[i].text) for i in sorted(revised + train)])
    _write(
        "train",
        [(documents[i], 1, documents[i].text) for i in train] + [(documents[i], 2, second[i]) for i in train],
    )
    _write("revised", [(documents[i], 2, second[i]) for i in revised])
    _write("new", [(documents[i], 1, documents[i].text) for i in new])


def revise(text: str, generator: random.Random) -> str:
    """A later revision of a text: half of the numbers replaced by others as long, a twentieth of the lines removed."""

    def update(match: re.Match) -> str:
        if generator.random() < 0.5:
            return match[0]
        return "".join(generator.choice("0123456789") for _ in match[0])

    lines = re.sub("[0-9]+", update, text).splitlines(keepends=True)
    if len(lines) > 1:
        first = generator.randrange(len(lines) // 2, len(lines))
        del lines[first : first + max(1, len(lines) // 20)]
    return "".join(lines)


def _write(name: str, rows: list[tuple[Document, int, str]]) -> None:
    path = Path(_OUTPUT.value) / f"{name}.jsonl"
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for document, revision, text in rows:
            # Each revision is a document of its own, as two pages of the web are.
            record = {"id": f"{document.id}, revision {revision}", "text": text, **document.metadata}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    print(f"{path}: {len(rows)} documents, {sum(len(text.encode()) for _, _, text in rows):,} bytes")


if __name__ == "__main__":
    program.run(main)
