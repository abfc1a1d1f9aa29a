"""The corpus stage: documents to chunks of M tokens, and the memory-mapped reader of what it wrote.

A chunk knows the UTF-8 bytes its tokens stand for, and their sum over all chunks is the bytes of the documents. One
input file is one shard, and one unit of work (`chunking.py`).
"""

import bisect
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from retro_jax.data.arrays import files_of, save_array
from retro_jax.data.chunking import TOTALS, write_chunks
from retro_jax.data.distribute import BeamOptions, Unit, WorkersError, distribute
from retro_jax.data.sources import Source, exclusion_files, repeated_rows, write_digests
from retro_jax.data.stage import Manifest, Stage, load_manifest, shard_name, verify_checksums
from retro_jax.data.text import common_root, file_fingerprints
from retro_jax.data.tokenizer import PAD_ID, Tokenizer
from retro_jax.errors import UserError

TOKENIZER_FILE = "tokenizer.model"


def build_corpus(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    chunk_length: int = 64,
    skip_bad: bool = False,
    exclusions: str | Path | None = None,
    short: bool = False,
    options: BeamOptions | None = None,
) -> Manifest:
    """Tokenises documents and writes them as chunks; continues where an earlier run stopped.

    A worker holds one document at a time, and 24 bytes for each document of its file while ids are compared.

    Args:
      inputs: files that `retro_jax.data.text.read_documents` reads; each becomes a shard.
      tokenizer: its file is copied beside the chunks.
      directory: what is written.
      chunk_length: M.
      skip_bad: count and leave out unreadable lines and documents whose id came before, instead of stopping.
      exclusions: output of `retro_jax.data.duplicates.find_duplicates` for these inputs: documents to leave out.
      short: it is no mistake when every document is shorter than a chunk (whose end is padding then, as always).
      options: where the files are worked off; default in this process.

    Raises:
      UserError: bad input (with file and line), an id used twice, no document, or no chunk with M tokens unless
        `short`; exclusions that were found in other files.
    """
    inputs = [Path(path) for path in inputs]
    if not inputs:
        raise UserError("no input files are given; a corpus needs at least one")
    if chunk_length < 1:
        raise UserError(f"chunk_length must be at least 1, is {chunk_length}")
    options = options or BeamOptions()
    files = file_fingerprints(inputs)
    made_from = {"tokenizer": tokenizer.fingerprint, **files}
    excluded: list[str | None] = [None] * len(inputs)
    if exclusions is not None:
        made_from["exclusions"], excluded = exclusion_files(exclusions, inputs, list(files.values()))
    sources = [
        Source(str(path.absolute()), str(common_root(inputs)), skip_bad, shard)
        for path, shard in zip(inputs, excluded, strict=True)
    ]
    settings = {"chunk_length": chunk_length, "skip_bad": skip_bad, "vocab_size": tokenizer.vocab_size}
    if tokenizer.pad_id != PAD_ID:
        settings["pad_id"] = tokenizer.pad_id
    with Stage(directory, "corpus", settings=settings, inputs=made_from) as stage:
        if stage.complete:
            return stage.manifest
        sizes = [path.stat().st_size for path in inputs]
        shards = [_shard_names(i, len(inputs)) for i in range(len(inputs))]
        if not all(stage.has(name) for names in shards for name in names):
            repeated = _repeated(stage, sources, sizes, options)
            units = [
                Unit(
                    names,
                    {
                        "source": dataclasses.asdict(source),
                        "repeated": rows,
                        "tokenizer": str(tokenizer.path.absolute()),
                        "chunk_length": chunk_length,
                        "shards": names,
                    },
                    size,
                )
                for names, source, rows, size in zip(shards, sources, repeated, sizes, strict=True)
            ]
            distribute(stage, units, write_chunks, options, label="corpus", unit="bytes")
        stage.keep([name for names in shards for name in names])
        counts = {key: sum(stage.counts(names[-1])[key] for names in shards) for key in TOTALS}
        if counts["complete_chunks"] == 0 and not (short and counts["documents"]):
            stage.discard()
            if counts["documents"] == 0:
                raise UserError(f"{_described(inputs)}: no document with text in it, so there is no corpus to build")
            raise UserError(
                f"{_described(inputs)}: no document fills a chunk of {chunk_length} tokens; give longer text"
            )
        with stage.shard(TOKENIZER_FILE) as (temporary, _):
            shutil.copyfile(tokenizer.path, temporary)
        return stage.finish(counts)


@dataclasses.dataclass(frozen=True)
class DocumentRecord:
    """A document of a corpus without its tokens.

    Attributes:
      id, group, metadata: as in the input.
      bytes: UTF-8 bytes of its text.
      key: number of its group, equal in every corpus.
      first_chunk: global id of its first chunk.
      chunks: how many it has.
    """

    id: str
    group: str
    metadata: dict[str, str]
    bytes: int
    key: int
    first_chunk: int
    chunks: int


class Corpus:
    """Reads a corpus directory through memory maps; chunk and document ids are global int64 of any shape.

    An id of -1 means "none" everywhere: PAD tokens, length 0, document -1. Any other id outside the corpus is an
    IndexError.

    Attributes:
      directory, manifest, fingerprint: of the stage.
      chunk_length: M.
      vocab_size, pad_id: of the tokenizer.
      tokenizer_fingerprint: of the tokenizer it was made with.
      num_chunks, num_documents, num_bytes, num_tokens: totals; tokens count BOS and EOS, not PAD.
      shard_offsets: int64 [shards + 1], global id of each shard's first chunk.
    """

    def __init__(self, directory: str | Path, *, verify: bool = False) -> None:
        """Opens the corpus.

        Args:
          directory: output of the corpus stage.
          verify: read everything once and compare with the manifest's checksums.

        Raises:
          UserError: no complete corpus here, a shard missing or of the wrong size, or a wrong checksum.
        """
        self.directory = Path(directory)
        self.manifest = load_manifest(directory, "corpus")
        if verify:
            verify_checksums(directory, self.manifest.shards)
        self.fingerprint = self.manifest.fingerprint
        self.chunk_length: int = self.manifest.settings["chunk_length"]
        self.vocab_size: int = self.manifest.settings["vocab_size"]
        self.pad_id: int = self.manifest.settings.get("pad_id", PAD_ID)
        self.tokenizer_fingerprint: str = self.manifest.inputs["tokenizer"]
        counts = self.manifest.counts
        self.num_chunks: int = counts["chunks"]
        self.num_documents: int = counts["documents"]
        self.num_bytes: int = counts["bytes"]
        self.num_tokens: int = counts["tokens"]
        names = [shard.name for shard in self.manifest.shards]
        chunks = [name for name in names if name.startswith("chunks-")]
        documents = [name for name in names if name.startswith("documents-") and name.endswith(".npy")]
        records = [name for name in names if name.endswith(".jsonl")]
        self._names = (chunks, documents, records)
        self._chunks, self._documents = [self._map(name) for name in chunks], [self._map(name) for name in documents]
        self._records = [self.directory / name for name in records]
        self.shard_offsets = _offsets(self._chunks)
        self._document_offsets = _offsets(self._documents)

    def verify(self, chunks: range | None = None) -> None:
        """Compares the checksums of the files with these chunks, their documents and the tokenizer; None: of all.

        Raises:
          UserError: naming the first file that differs.
        """
        shards = self.manifest.shards
        if chunks is not None:
            chosen = files_of(self.shard_offsets, chunks)
            names = {TOKENIZER_FILE, *(name for kind in self._names for name in kind[chosen])}
            shards = [shard for shard in shards if shard.name in names]
        verify_checksums(self.directory, shards)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with, from its own copy."""
        return Tokenizer(self.directory / TOKENIZER_FILE)

    def tokens(self, ids: np.ndarray | int) -> np.ndarray:
        """int32 [..., M]: tokens of the chunks; PAD behind the last one of a document and for -1."""
        return self._gather(ids, "tokens", np.int32, self.pad_id)

    def lengths(self, ids: np.ndarray | int) -> np.ndarray:
        """int32 [...]: tokens in the chunks, without PAD."""
        return self._gather(ids, "length", np.int32, 0)

    def byte_counts(self, ids: np.ndarray | int) -> np.ndarray:
        """int64 [...]: UTF-8 bytes of the text that the chunks' tokens stand for."""
        return self._gather(ids, "bytes", np.int64, 0)

    def document_index(self, ids: np.ndarray | int) -> np.ndarray:
        """int64 [...]: global index of the document each chunk belongs to; -1 for -1."""
        ids = np.asarray(ids, np.int64)
        local = self._gather(ids, "document", np.int64, -1)
        return np.where(ids >= 0, local + self._document_offsets[self._shard_of(ids)], -1)

    def document_keys(self, ids: np.ndarray | int) -> np.ndarray:
        """int64 [...]: key of the document's group, comparable between corpora; -1 for -1."""
        return self._gather_documents(self.document_index(ids), "key", -1)

    def continuation(self, ids: np.ndarray | int) -> np.ndarray:
        """int64 [...]: id of the next chunk of the same document, -1 where the document ends (spec: never beyond)."""
        ids = np.asarray(ids, np.int64)
        following = np.where((ids >= 0) & (ids + 1 < self.num_chunks), ids + 1, -1)
        same = (following >= 0) & (self.document_index(ids) == self.document_index(following))
        return np.where(same, following, -1)

    def neighbour_tokens(self, ids: np.ndarray | int) -> np.ndarray:
        """int32 [..., 2M]: the chunk and, from position M, its continuation (paper section 2.3); PAD where missing."""
        ids = np.asarray(ids, np.int64)
        return np.concatenate([self.tokens(ids), self.tokens(self.continuation(ids))], axis=-1)

    def document_range(self, index: int) -> tuple[int, int]:
        """(global id of its first chunk, number of chunks) of document `index`."""
        shard, row = self._document_row(index)
        return int(row["first_chunk"] + self.shard_offsets[shard]), int(row["chunks"])

    def document_ranges(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each shard int64 [its documents] twice: first chunk id and number of chunks of every document."""
        for table, offset in zip(self._documents, self.shard_offsets[:-1], strict=True):
            yield table["first_chunk"] + offset, table["chunks"]

    def document(self, index: int) -> DocumentRecord:
        """Name, group, metadata and size of document `index`."""
        shard, row = self._document_row(index)
        with open(self._records[shard], "rb") as file:
            file.seek(row["offset"])
            record = json.loads(file.readline())
        return DocumentRecord(
            record["id"],
            record["group"],
            record["metadata"],
            int(row["bytes"]),
            int(row["key"]),
            int(row["first_chunk"] + self.shard_offsets[shard]),
            int(row["chunks"]),
        )

    def text(self, chunk: int) -> str:
        """Text of one chunk; a character that its end cuts in two shows as U+FFFD."""
        return self.tokenizer.decode(self.tokens(chunk))

    def _map(self, name: str) -> np.ndarray:
        try:
            return np.load(self.directory / name, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{self.directory / name}: not a shard of a corpus ({error}); rebuild it") from None

    def _shard_of(self, ids: np.ndarray) -> np.ndarray:
        """Shard of every id (0 for -1); ids outside the corpus are refused."""
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_chunks):
            raise IndexError(f"chunk ids from {ids.min()} to {ids.max()}, the corpus has {self.num_chunks}")
        return np.maximum(np.searchsorted(self.shard_offsets, ids, side="right") - 1, 0)

    def _gather(self, ids: np.ndarray | int, field: str, dtype: type, missing: int) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        return _gather(self._chunks, self.shard_offsets, self._shard_of(ids), ids, field, dtype, missing)

    def _gather_documents(self, indices: np.ndarray, field: str, missing: int) -> np.ndarray:
        shards = np.maximum(np.searchsorted(self._document_offsets, indices, side="right") - 1, 0)
        return _gather(self._documents, self._document_offsets, shards, indices, field, np.int64, missing)

    def _document_row(self, index: int) -> tuple[int, np.void]:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index}, the corpus has {self.num_documents}")
        shard = bisect.bisect_right(self._document_offsets, index) - 1
        return shard, self._documents[shard][index - self._document_offsets[shard]]


def _gather(
    arrays: list[np.ndarray],
    offsets: np.ndarray,
    shards: np.ndarray,
    ids: np.ndarray,
    field: str,
    dtype: type,
    missing: int,
) -> np.ndarray:
    result = np.full(ids.shape + arrays[0].dtype[field].shape, missing, dtype)
    for shard in np.unique(shards[ids >= 0]):
        chosen = (shards == shard) & (ids >= 0)
        result[chosen] = arrays[shard][field][ids[chosen] - offsets[shard]]
    return result


def _offsets(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)


def _repeated(stage: Stage, sources: list[Source], sizes: list[int], options: BeamOptions) -> list[str | None]:
    """For each source a file with its rows whose id came before, or None when there are none."""
    count = len(sources)
    shards = [shard_name("digests", i, count, ".npy") for i in range(count)]
    units = [
        Unit((shard,), {"source": dataclasses.asdict(source), "shard": shard}, size)
        for shard, source, size in zip(shards, sources, sizes, strict=True)
    ]
    try:
        distribute(stage, units, write_digests, options, label="reading", unit="bytes")
        repeated = repeated_rows(sources, [stage.directory / shard for shard in shards])
    except WorkersError:
        raise
    except UserError:
        if not any(stage.has(name) for i in range(count) for name in _shard_names(i, count)):
            stage.discard()  # a mended input must not find the traces of the bad one
        raise
    files: list[str | None] = []
    for i, rows in enumerate(repeated):
        name = shard_name("repeated", i, count, ".npy")
        if len(rows) and not stage.has(name):
            with stage.shard(name) as (path, _):
                save_array(path, rows)
        files.append(str((stage.directory / name).absolute()) if len(rows) else None)
    return files


def _shard_names(index: int, count: int) -> tuple[str, str, str]:
    """Of names, documents and chunks."""
    return (
        shard_name("documents", index, count, ".jsonl"),
        shard_name("documents", index, count, ".npy"),
        shard_name("chunks", index, count, ".npy"),
    )


def _described(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
