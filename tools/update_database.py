"""Changes a database without building it again: adds documents, removes them, or compacts what has become of it.

    python tools/update_database.py add --database=DB --input=new.jsonl.gz --embedder=minilm
    python tools/update_database.py remove --database=DB --ids=doc-17,doc-99
    python tools/update_database.py remove --database=DB --ids_file=withdrawn.txt --groups=book-3
    python tools/update_database.py compact --database=DB --output=DB2 --num_shards=4

Added chunks get ids behind those that are there, in an index of their own. Removed documents are found by no search any
more; their tokens stay until the database is compacted into a new directory. A server of the database loads the new
state when it looks for one; neighbours that were found before name the old state by its fingerprint.

The new index is asked for as the database's was, but for what fits a number of vectors (tree or not, leaves), which
goes by rule; --settings takes what tune_index.py wrote instead. A document without an id is known by its file and line,
so files that are added one day and the next need names of their own. What is added to a training database goes through
tools/find_duplicates.py first, as what it was built from did: --exclusions leaves out what evaluation documents hold. A
compaction during which the database is changed fails at its end: what was removed meanwhile must not come back.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from retro_jax.data.text import expand_inputs
from retro_jax.errors import UserError
from retro_jax.program import beam_options, define_beam_flags, run

if TYPE_CHECKING:
    from retro_jax.retrieval.index_settings import IndexSettings

ACTIONS = ("add", "remove", "compact")

_DATABASE = flags.DEFINE_string("database", None, "directory with corpus/, embeddings/ and index/", required=True)
_INPUT = flags.DEFINE_list("input", [], "add: files or glob patterns, separated by commas")
_EMBEDDER = flags.DEFINE_string("embedder", None, "add: checkpoint directory of the database's embedder")
_SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "add: count and leave out unreadable lines and ids used before")
_EXCLUSIONS = flags.DEFINE_string("exclusions", None, "add: output of find_duplicates.py for these files, left out")
_IDS = flags.DEFINE_list("ids", [], "remove: ids of documents, separated by commas")
_IDS_FILE = flags.DEFINE_string("ids_file", None, "remove: text file of ids, one a line")
_GROUPS = flags.DEFINE_list("groups", [], "remove: groups whose documents all go")
_SETTINGS = flags.DEFINE_string("settings", None, "add, compact: JSON file of tools/tune_index.py for the new index")
_OUTPUT = flags.DEFINE_string("output", None, "compact: directory of the new database")
_NUM_SHARDS = flags.DEFINE_integer("num_shards", None, "compact: shards of its index; default: by rule", lower_bound=1)
_MIN_RECALL = flags.DEFINE_float("min_recall", 0.95, "recall@2 below which building an index fails")
define_beam_flags()


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in ACTIONS:
        raise UserError(f"say what to do, one of {', '.join(ACTIONS)}: update_database.py add --database=DB ...")
    {"add": add, "remove": remove, "compact": compact}[arguments[0]]()


def add() -> None:
    if not _INPUT.value or _EMBEDDER.value is None:
        raise UserError("add needs --input and --embedder")
    # After the flags: these bring TensorFlow and JAX.
    from retro_jax.retrieval.embedder import Embedder, EmbeddingSet
    from retro_jax.retrieval.segments import DatabaseCorpus
    from retro_jax.retrieval.update import add_documents

    before = DatabaseCorpus(_DATABASE.value)
    made = EmbeddingSet(Path(_DATABASE.value) / "embeddings").manifest.settings["embedder"]
    embedder = Embedder.load(
        _EMBEDDER.value,
        normalize=made["normalize"],
        max_length=made["max_length"],
        compute_dtype=made["compute_dtype"],
    )
    after = add_documents(
        _DATABASE.value,
        expand_inputs(_INPUT.value),
        embedder,
        settings=_settings(),
        min_recall=_MIN_RECALL.value,
        skip_bad=_SKIP_BAD.value,
        exclusions=_EXCLUSIONS.value,
        options=beam_options(),
    )
    print(
        f"{_DATABASE.value}: {after.num_documents - before.num_documents:,} documents with "
        f"{after.num_chunks - before.num_chunks:,} chunks added, ids from {before.num_chunks:,}; version "
        f"{after.segments.version}"
    )


def remove() -> None:
    from retro_jax.retrieval.segments import Segments
    from retro_jax.retrieval.update import remove_documents

    ids = [*_IDS.value, *(_lines(Path(_IDS_FILE.value)) if _IDS_FILE.value else [])]
    if not ids and not _GROUPS.value:
        raise UserError("remove needs --ids, --ids_file or --groups")
    documents, chunks = remove_documents(_DATABASE.value, ids=ids, groups=_GROUPS.value)
    print(
        f"{_DATABASE.value}: {documents:,} documents with {chunks:,} chunks removed; version "
        f"{Segments.load(_DATABASE.value).version}"
    )


def compact() -> None:
    if _OUTPUT.value is None:
        raise UserError("compact needs --output, the directory of the new database")
    from retro_jax.retrieval.compaction import compact_database

    counts = compact_database(
        _DATABASE.value,
        _OUTPUT.value,
        settings=_settings(),
        num_shards=_NUM_SHARDS.value,
        min_recall=_MIN_RECALL.value,
        options=beam_options(),
    ).counts
    print(f"{_OUTPUT.value}: {counts['documents']:,} documents, {counts['chunks']:,} chunks")


def _settings() -> "IndexSettings":
    from retro_jax.retrieval.index_settings import IndexSettings
    from retro_jax.retrieval.update import default_settings

    return default_settings(_DATABASE.value) if _SETTINGS.value is None else IndexSettings.load(_SETTINGS.value)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


if __name__ == "__main__":
    run(main, positional=True)
