"""The corpus stage: documents to chunks of M tokens, and the memory-mapped reader of what it wrote.

A document is [BOS] tokens [EOS], cut into chunks from its own start; the last chunk is padded. A chunk knows the UTF-8
bytes its tokens stand for, and their sum over all chunks is the bytes of the documents. One input file is one shard.
"""

import bisect
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.stage import Manifest, Stage, file_sha256, load_manifest, shard_name, verify_checksums
from retro_jax.data.text import Document, ReadCounts, common_root, read_documents
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.progress import Progress

TOKENIZER_FILE = "tokenizer.model"
_DOCUMENT_DTYPE = np.dtype(
    [("key", "<i8"), ("first_chunk", "<i8"), ("chunks", "<i8"), ("bytes", "<i8"), ("offset", "<i8")]
)
_TOTALS = ("documents", "chunks", "tokens", "bytes", "bad_lines", "empty_documents", "duplicate_documents")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_key(group: str) -> int:
    """63-bit non-negative number of a document's group; equal in every corpus."""
    return int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "little") >> 1


def build_corpus(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    chunk_length: int = 64,
    skip_bad: bool = False,
) -> Manifest:
    """Tokenises documents and writes them as chunks; continues where an earlier run stopped.

    Args:
      inputs: files that `retro_jax.data.text.read_documents` reads; each becomes a shard.
      tokenizer: its file is copied beside the chunks.
      directory: what is written.
      chunk_length: M.
      skip_bad: count and leave out unreadable lines and documents whose id came before, instead of stopping.

    Raises:
      UserError: bad input (with file and line), an id used twice, no document, or no chunk with M tokens.
    """
    inputs = [Path(path) for path in inputs]
    if not inputs:
        raise UserError("no input files are given; a corpus needs at least one")
    if chunk_length < 1:
        raise UserError(f"chunk_length must be at least 1, is {chunk_length}")
    root = common_root(inputs)
    settings = {"chunk_length": chunk_length, "skip_bad": skip_bad, "vocab_size": tokenizer.vocab_size}
    fingerprints = {os.path.relpath(path, root): file_sha256(path)[:16] for path in inputs}
    if len(fingerprints) < len(inputs):
        raise UserError("an input file is named twice")
    sizes = [path.stat().st_size for path in inputs]
    with Stage(
        directory, "corpus", settings=settings, inputs={"tokenizer": tokenizer.fingerprint, **fingerprints}
    ) as stage:
        if stage.complete:
            return stage.manifest
        names = [_shard_names(i, len(inputs)) for i in range(len(inputs))]
        finished = [all(map(stage.has, shard)) for shard in names]
        seen = _SeenIds(stage.directory)
        initial = sum(size for size, done in zip(sizes, finished, strict=True) if done)
        with Progress("corpus", total=sum(sizes), unit="bytes", initial=initial) as progress:
            for path, shard, done in zip(inputs, names, finished, strict=True):
                if not done:
                    _write_shard(stage, shard, path, root, tokenizer, chunk_length, skip_bad, seen, progress)
                seen.close_shard(shard[2])
            counts = {key: sum(stage.counts(shard[0])[key] for shard in names) for key in (*_TOTALS, "complete_chunks")}
            if counts["complete_chunks"] == 0:
                stage.discard()
                if counts["documents"] == 0:
                    raise UserError(
                        f"{_described(inputs)}: no document with text in it, so there is no corpus to build"
                    )
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
      vocab_size: V.
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
            verify_checksums(directory, self.manifest)
        self.fingerprint = self.manifest.fingerprint
        self.chunk_length: int = self.manifest.settings["chunk_length"]
        self.vocab_size: int = self.manifest.settings["vocab_size"]
        self.tokenizer_fingerprint: str = self.manifest.inputs["tokenizer"]
        counts = self.manifest.counts
        self.num_chunks: int = counts["chunks"]
        self.num_documents: int = counts["documents"]
        self.num_bytes: int = counts["bytes"]
        self.num_tokens: int = counts["tokens"]
        names = [shard.name for shard in self.manifest.shards]
        self._chunks = [self._map(name) for name in names if name.startswith("chunks-")]
        self._documents = [self._map(name) for name in names if name.startswith("documents-") and name.endswith(".npy")]
        self._records = [self.directory / name for name in names if name.endswith(".jsonl")]
        self.shard_offsets = _offsets(self._chunks)
        self._document_offsets = _offsets(self._documents)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the corpus was made with, from its own copy."""
        return Tokenizer(self.directory / TOKENIZER_FILE)

    def tokens(self, ids: np.ndarray | int) -> np.ndarray:
        """int32 [..., M]: tokens of the chunks; PAD behind the last one of a document and for -1."""
        return self._gather(ids, "tokens", np.int32, Tokenizer.pad_id)

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

    def document_ranges(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [documents] each: first chunk id and number of chunks of every document."""
        firsts = [
            table["first_chunk"] + offset
            for table, offset in zip(self._documents, self.shard_offsets[:-1], strict=True)
        ]
        return np.concatenate(firsts), np.concatenate([table["chunks"] for table in self._documents])

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


def _shard_names(index: int, count: int) -> tuple[str, str, str]:
    return (
        shard_name("chunks", index, count, ".npy"),
        shard_name("documents", index, count, ".npy"),
        shard_name("documents", index, count, ".jsonl"),
    )


def _write_shard(
    stage: Stage,
    names: tuple[str, str, str],
    path: Path,
    root: Path,
    tokenizer: Tokenizer,
    chunk_length: int,
    skip_bad: bool,
    seen: "_SeenIds",
    progress: Progress,
) -> None:
    """Writes the chunks, the table of documents and their names for one input file."""
    chunk_dtype = np.dtype(
        [
            ("tokens", token_dtype(tokenizer.vocab_size), (chunk_length,)),
            ("length", "<u2" if chunk_length < 2**16 else "<u4"),
            ("bytes", "<u4"),
            ("document", "<u4"),
        ]
    )
    read = ReadCounts()
    totals = dict.fromkeys((*_TOTALS, "complete_chunks"), 0)
    shown = 0
    with (
        stage.shard(names[2]) as (records_path, _),
        stage.shard(names[1]) as (documents_path, _),
        stage.shard(names[0]) as (chunks_path, counts),
    ):
        with (
            ArrayWriter(chunks_path, chunk_dtype) as chunks,
            ArrayWriter(documents_path, _DOCUMENT_DTYPE) as documents,
            open(records_path, "wb") as records,
        ):
            for document in read_documents([path], skip_bad=skip_bad, counts=read, root=root):
                progress.update(read.position - shown)
                shown = read.position
                if (earlier := seen.add(document)) is not None:
                    if not skip_bad:
                        raise UserError(f"{document.place}: the id {document.id!r} was already used at {earlier}")
                    totals["duplicate_documents"] += 1
                    continue
                rows = _cut_into_chunks(document.text, tokenizer, chunk_dtype, documents.rows)
                entry = (document_key(document.group), chunks.rows, len(rows), rows["bytes"].sum(), records.tell())
                documents.append(np.array([entry], _DOCUMENT_DTYPE))
                chunks.append(rows)
                records.write(_record_line(document))
                totals["documents"] += 1
                totals["chunks"] += len(rows)
                totals["tokens"] += int(rows["length"].sum())
                totals["bytes"] += int(rows["bytes"].sum())
                totals["complete_chunks"] += int((rows["length"] == chunk_length).sum())
        progress.update(read.position - shown)
        counts.update(totals, bad_lines=read.bad_lines, empty_documents=read.empty_documents)


def _cut_into_chunks(text: str, tokenizer: Tokenizer, dtype: np.dtype, document: int) -> np.ndarray:
    """Chunk rows of one document."""
    chunk_length = dtype["tokens"].shape[0]
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int64)
    rows = np.zeros(-(-len(ids) // chunk_length), dtype)
    padded = np.full(len(rows) * chunk_length, tokenizer.pad_id, np.int64)
    padded[: len(ids)] = ids
    rows["tokens"] = padded.reshape(-1, chunk_length)
    rows["length"] = chunk_length
    rows["length"][-1] = len(ids) - (len(rows) - 1) * chunk_length
    rows["bytes"] = tokenizer.token_bytes[padded].reshape(-1, chunk_length).sum(axis=1)
    rows["document"] = document
    if rows["bytes"].sum(dtype=np.int64) != len(text.encode()):
        raise AssertionError(f"document {document}: bytes of the tokens differ from bytes of the text")
    return rows


def _record_line(document: Document) -> bytes:
    record: dict[str, Any] = {"id": document.id, "group": document.group, "metadata": document.metadata}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _described(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


class _SeenIds:
    """Finds an id that came before, also in shards of an earlier run, with 8 bytes an id for finished shards."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: list[str] = []
        self._finished = np.zeros(0, np.uint64)
        self._current: dict[int, tuple[str, str]] = {}

    def add(self, document: Document) -> str | None:
        """Remembers a document; gives the place of an earlier one with its id, or None."""
        number = _id_hash(document.id)
        if number in self._current and self._current[number][0] == document.id:
            return self._current[number][1]
        place = np.searchsorted(self._finished, np.uint64(number))
        if place < len(self._finished) and int(self._finished[place]) == number:
            for name in self._names:  # two ids may share a hash: look at the names themselves
                for identity, row in self._read(name):
                    if identity == document.id:
                        return f"document {row} of {self._directory / name}"
        self._current[number] = (document.id, document.place)
        return None

    def close_shard(self, name: str) -> None:
        """Moves on to the next shard; `name` is the finished shard's .jsonl."""
        numbers = np.array([_id_hash(identity) for identity, _ in self._read(name)], np.uint64)
        self._finished = np.sort(np.concatenate([self._finished, numbers]))
        self._names.append(name)
        self._current = {}

    def _read(self, name: str) -> Any:
        with open(self._directory / name, "rb") as file:
            for row, line in enumerate(file):
                yield json.loads(line)["id"], row


def _id_hash(identity: str) -> int:
    return int.from_bytes(blake2b(identity.encode(), digest_size=8).digest(), "little")
