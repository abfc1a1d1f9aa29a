"""Changes of a database without a rebuild: documents are added in a segment of their own, removed by a list, compacted.

A change takes effect when `segments.json` is replaced, at the end; until then, and when it is interrupted, readers see
the database as it was. One addition at a time: `additions` is locked while it is made. Whoever replaces `segments.json`
locks the database, an addition for its last moment only, so that removals need not wait for it.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.distribute import BeamOptions
from retro_jax.data.ranges import in_ranges
from retro_jax.data.stage import fingerprint, verify_checksums
from retro_jax.errors import UserError
from retro_jax.lock import DirectoryLock
from retro_jax.retrieval.database import require_embedder
from retro_jax.retrieval.embedder import EmbeddingSet, embed_corpus
from retro_jax.retrieval.index import Index
from retro_jax.retrieval.index_build import MIN_RECALL, build_index
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.segments import ADDITIONS, DatabaseCorpus, Segments

if TYPE_CHECKING:
    from retro_jax.retrieval.embedder import Embedder

REMEDY = "wait for that change of the database"


def add_documents(
    directory: str | os.PathLike,
    inputs: Sequence[Path],
    embedder: "Embedder",
    *,
    settings: IndexSettings | None = None,
    min_recall: float = MIN_RECALL,
    skip_bad: bool = False,
    exclusions: str | os.PathLike | None = None,
    options: BeamOptions | None = None,
) -> DatabaseCorpus:
    """Adds the documents of some files; run again after an interruption it goes on with the same addition.

    Args:
      directory: of the database.
      inputs: files as `build_corpus` takes them; the documents may be shorter than a chunk.
      embedder: the one the database was made with.
      settings, min_recall: of the index of the new chunks.
      skip_bad: count and leave out what cannot be read.
      exclusions: output of `retro_jax.data.duplicates.find_duplicates` for these inputs: documents to leave out.
      options: where the work is done.

    Returns:
      The database's chunks with the new ones.

    Raises:
      UserError: an id that the database already has (nothing is left of the addition then), another embedder, or see
        `build_corpus`.
    """
    directory = Path(directory)
    base = DatabaseCorpus(directory).parts[0]
    require_embedder(
        embedder.fingerprint, EmbeddingSet(directory / "embeddings").embedder_fingerprint, "the given embedder"
    )
    (directory / ADDITIONS).mkdir(exist_ok=True)
    with DirectoryLock(directory / ADDITIONS, REMEDY):
        name = f"{1 + max([0, *map(int, Segments.load(directory).additions)]):05d}"
        folder = directory / ADDITIONS / name
        build_corpus(
            inputs,
            base.tokenizer,
            folder / "corpus",
            chunk_length=base.chunk_length,
            skip_bad=skip_bad,
            exclusions=exclusions,
            short=True,
            options=options,
        )
        added = Corpus(folder / "corpus")
        _refuse_known_ids(DatabaseCorpus(directory), added, folder)
        embed_corpus(added, embedder, folder / "embeddings")
        build_index(
            EmbeddingSet(folder / "embeddings"),
            folder / "index",
            settings,
            min_recall=min_recall,
            options=options,
        )
        # Documents may have been removed meanwhile; none can have been added.
        with DirectoryLock(
            directory, "the addition is made: run this again when that change of the database has ended"
        ):
            segments = Segments.load(directory)
            segments.save(directory, additions=(*segments.additions, name), removed=segments.removed)
    return DatabaseCorpus(directory)


def remove_documents(
    directory: str | os.PathLike, *, ids: Iterable[str] = (), groups: Iterable[str] = ()
) -> tuple[int, int]:
    """Takes documents out: from now on no search finds them. Removing them again changes nothing.

    Args:
      directory: of the database.
      ids: of documents, as in the input.
      groups: all documents of these go too.

    Returns:
      (documents, chunks) that were removed and had not been.

    Raises:
      UserError: an id or a group that the database does not have.
    """
    directory, ids, groups = Path(directory), set(ids), set(groups)
    with DirectoryLock(directory, REMEDY):
        corpus = DatabaseCorpus(directory)
        removed = corpus.segments.removed
        missing_ids, missing_groups = set(ids), set(groups)
        ranges, documents = [removed], 0
        for name, group, first, stop in _documents(corpus):
            if name in ids or group in groups:
                missing_ids.discard(name)
                missing_groups.discard(group)
                if not in_ranges(np.int64(first), removed):
                    ranges.append(np.array([[first, stop]]))
                    documents += 1
        for kind, missing in (("document", missing_ids), ("group", missing_groups)):
            if missing:
                some = ", ".join(repr(name) for name in sorted(missing)[:3])
                raise UserError(f"{directory} has no {kind} {some}{' and others' if len(missing) > 3 else ''}")
        if documents:
            corpus.segments.save(directory, additions=corpus.segments.additions, removed=np.concatenate(ranges))
        return documents, int(sum((each[:, 1] - each[:, 0]).sum() for each in ranges[1:]))


def default_settings(directory: str | os.PathLike) -> IndexSettings:
    """How the index of a database's base was asked for, without what was meant for the number of its vectors.

    An addition has fewer, and so may a compacted database have: too few for a tree of so many leaves, or for any tree.
    """
    asked = IndexSettings(**Index.load(Path(directory) / "index", shards=(), verify=False).manifest.settings["index"])
    kind = "auto" if asked.kind == "tree" else asked.kind
    return dataclasses.replace(asked, kind=kind, num_leaves=None, leaves_to_search=None)


def _documents(corpus: DatabaseCorpus) -> Iterator[tuple[str, str, int, int]]:
    """(id, group, first chunk, stop) of every document, in order."""
    for part, offset in zip(corpus.parts, corpus.offsets[:-1].tolist(), strict=True):
        lines = _document_lines(part)
        for firsts, counts in part.document_ranges():
            for first, count in zip(firsts.tolist(), counts.tolist(), strict=True):
                record = json.loads(next(lines))
                yield record["id"], record["group"], offset + first, offset + first + count


def _document_lines(corpus: Corpus) -> Iterator[bytes]:
    """The line of JSON that a corpus keeps of every document, in order."""
    for shard in corpus.manifest.shards:
        if shard.name.endswith(".jsonl"):
            verify_checksums(corpus.directory, [shard])
            with open(corpus.directory / shard.name, "rb") as file:
                yield from file


def _refuse_known_ids(known: DatabaseCorpus, added: Corpus, folder: Path) -> None:
    """Refuses an addition with a document that is already there and not removed, and takes the addition back."""
    new = {json.loads(line)["id"] for line in _document_lines(added)}
    for name, _, first, _ in _documents(known):
        if name in new and not known.removed(first):
            shutil.rmtree(folder)
            raise UserError(
                f"the database already has a document {name!r}; remove it first where this one replaces it, and leave "
                "it out where it is the same; another one needs another id (without an id, a document is known by its "
                "file and line: name the file otherwise)"
            )


def compacted_fingerprint(corpus: DatabaseCorpus) -> str:
    """What a compaction of this database is known by."""
    return fingerprint({"corpus": corpus.fingerprint, "removed": corpus.segments.removed.tolist()})
