"""The input files of a corpus, one after another or each on another worker, without the documents to be left out.

A document is known by its row: its number among those the reader gives of its file. Before anything is tokenised every
file is read once: unreadable lines come out, and the digests of the documents' ids are sorted, so that an id that was
used before, in whatever file, is found by merging. That takes 24 bytes a document of one file in a worker, and a
bounded part of all digests here.
"""

import bisect
import dataclasses
import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import save_array
from retro_jax.data.stage import ShardWriter, load_manifest, verify_checksums
from retro_jax.data.text import Document, ReadCounts, read_documents
from retro_jax.errors import UserError

DIGEST_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
_MERGED_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class Source:
    """An input file.

    Attributes:
      path: the file.
      root: directory that the names of documents without an id are relative to.
      skip_bad: leave out lines that cannot be read.
      excluded: file of JSON lines whose "row" is left out (`retro_jax.data.duplicates`), or None.
    """

    path: str
    root: str
    skip_bad: bool
    excluded: str | None = None

    def excluded_rows(self) -> set[int]:
        if self.excluded is None:
            return set()
        with open(self.excluded, "rb") as lines:
            return {json.loads(line)["row"] for line in lines}

    def documents(self, counts: ReadCounts) -> Iterator[tuple[int, Document]]:
        """Rows and documents, without the excluded ones; `counts` is filled while they are read."""
        excluded = self.excluded_rows()
        found = read_documents([self.path], skip_bad=self.skip_bad, counts=counts, root=Path(self.root))
        for row, document in enumerate(found):
            if row in excluded:
                counts.excluded_documents += 1
            else:
                yield row, document

    def document(self, row: int) -> Document:
        """One document, by reading the file up to it."""
        return next(document for found, document in self.documents(ReadCounts()) if found == row)


def exclusion_files(directory: str | Path, inputs: Sequence[Path], checksums: Sequence[str]) -> tuple[str, list[str]]:
    """Fingerprint of the output of `find_duplicates`, and for each input the file that says what is left out of it.

    Args:
      directory: output of `find_duplicates`.
      inputs: files that it was made for, or some of them.
      checksums: of each, the first 16 hex digits of its SHA-256.

    Raises:
      UserError: it was not made for one of the files, or is damaged.
    """
    directory = Path(directory)
    manifest = load_manifest(directory, "duplicates")
    names = {checksum: name for name, checksum in manifest.settings["files"].items()}
    for path, checksum in zip(inputs, checksums, strict=True):
        if checksum not in names:
            raise UserError(f"{path}: {directory} was not made for this file; make it again for these inputs")
    verify_checksums(directory, manifest.shards)
    return manifest.fingerprint, [str((directory / names[checksum]).absolute()) for checksum in checksums]


def write_digests(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Unit of work: the digests of the ids of one file's documents, sorted, into the shard `arguments["shard"]`."""
    read = ReadCounts()
    shown = 0
    packed = bytearray()
    for row, document in Source(**arguments["source"]).documents(read):
        packed += blake2b(document.id.encode(), digest_size=16).digest() + row.to_bytes(8, "little")
        writer.advance(read.position - shown)
        shown = read.position
    with writer.shard(arguments["shard"]) as (path, _):
        save_array(path, np.sort(np.frombuffer(packed, DIGEST_DTYPE)))


def repeated_rows(
    sources: Sequence[Source], digests: Sequence[Path], *, merged_at_once: int = _MERGED_AT_ONCE
) -> list[np.ndarray]:
    """Rows of each source whose id an earlier document has, of this or an earlier source; sorted int64.

    Args:
      sources: in the order that says which document is the earlier one.
      digests: what `write_digests` wrote of each.
      merged_at_once: digests held in memory, about.

    Raises:
      UserError: there are some and a source is not to skip them; names the first with both places.
    """
    tables = [np.load(path, mmap_mode="r") for path in digests]
    parts = -(-sum(map(len, tables)) // merged_at_once) or 1
    bounds = [part * 2**64 // parts for part in range(1, parts)]
    cuts = [[0, *(bisect.bisect_left(t["high"], np.uint64(b)) for b in bounds), len(t)] for t in tables]
    found: list[list[np.ndarray]] = [[] for _ in tables]
    first: tuple[int, int, int, int] | None = None  # source and row of the first repeated one, and of the earlier one
    for part in range(parts):
        pieces = [table[cut[part] : cut[part + 1]] for table, cut in zip(tables, cuts, strict=True)]
        rows = np.concatenate(pieces)
        source = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        order = np.lexsort((rows["row"], source, rows["low"], rows["high"]))
        rows, source = rows[order], source[order]
        same = np.zeros(len(rows), bool)
        same[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        for i in np.unique(source[same]).tolist():
            found[i].append(rows["row"][same & (source == i)])
        if same.any():
            later = min(np.flatnonzero(same).tolist(), key=lambda i: (source[i], rows["row"][i]))
            pair = (later, later - 1)
            candidate = tuple(int(value) for i in pair for value in (source[i], rows["row"][i]))
            first = candidate if first is None else min(first, candidate)
    if first is not None and not sources[first[0]].skip_bad:
        document = sources[first[0]].document(first[1])
        earlier = sources[first[2]].document(first[3])
        raise UserError(f"{document.place}: the id {document.id!r} was already used at {earlier.place}")
    return [np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64) for parts in found]
