"""The unit of work of the corpus stage: one input file to chunks of M tokens, their documents and their names.

A document is [BOS] tokens [EOS], cut into chunks from its own start; the last chunk is padded.
"""

import functools
import json
from hashlib import blake2b
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.sources import Source
from retro_jax.data.stage import ShardWriter
from retro_jax.data.text import Document, ReadCounts
from retro_jax.data.tokenizer import Tokenizer

DOCUMENT_DTYPE = np.dtype(
    [("key", "<i8"), ("first_chunk", "<i8"), ("chunks", "<i8"), ("bytes", "<i8"), ("offset", "<i8")]
)
TOTALS = (
    "documents",
    "chunks",
    "tokens",
    "bytes",
    "bad_lines",
    "empty_documents",
    "duplicate_documents",
    "excluded_documents",
    "complete_chunks",
)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian unsigned type that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def document_key(group: str) -> int:
    """63-bit non-negative number of a document's group; equal in every corpus."""
    return int.from_bytes(blake2b(group.encode(), digest_size=8).digest(), "little") >> 1


def write_chunks(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Writes the names, the table of documents and the chunks of one input file.

    Args:
      writer: of the corpus stage.
      arguments: "source" (fields of `Source`), "repeated" (an .npy file with the rows whose id came before, or None),
        "tokenizer" (its file), "chunk_length", "shards" (of names, documents, chunks).
    """
    source = Source(**arguments["source"])
    repeated = set() if arguments["repeated"] is None else set(np.load(arguments["repeated"]).tolist())
    tokenizer = _tokenizer(arguments["tokenizer"])
    chunk_length = arguments["chunk_length"]
    names_shard, documents_shard, chunks_shard = arguments["shards"]
    chunk_dtype = np.dtype(
        [
            ("tokens", token_dtype(tokenizer.vocab_size), (chunk_length,)),
            ("length", "<u2" if chunk_length < 2**16 else "<u4"),
            ("bytes", "<u4"),
            ("document", "<u4"),
        ]
    )
    read = ReadCounts()
    totals = dict.fromkeys(TOTALS, 0)
    shown = 0
    with (  # left in the other order: names are finished first
        writer.shard(chunks_shard) as (chunks_path, counts),
        writer.shard(documents_shard) as (documents_path, _),
        writer.shard(names_shard) as (names_path, _),
    ):
        with (
            ArrayWriter(chunks_path, chunk_dtype) as chunks,
            ArrayWriter(documents_path, DOCUMENT_DTYPE) as documents,
            open(names_path, "wb") as names,
        ):
            for row, document in source.documents(read):
                writer.advance(read.position - shown)
                shown = read.position
                if row in repeated:
                    continue
                rows = _cut_into_chunks(document.text, tokenizer, chunk_dtype, documents.rows)
                entry = (document_key(document.group), chunks.rows, len(rows), rows["bytes"].sum(), names.tell())
                documents.append(np.array([entry], DOCUMENT_DTYPE))
                chunks.append(rows)
                names.write(_name_line(document))
                totals["documents"] += 1
                totals["chunks"] += len(rows)
                totals["tokens"] += int(rows["length"].sum())
                totals["bytes"] += int(rows["bytes"].sum())
                totals["complete_chunks"] += int((rows["length"] == chunk_length).sum())
        counts.update(
            totals,
            bad_lines=read.bad_lines,
            empty_documents=read.empty_documents,
            duplicate_documents=len(repeated),
            excluded_documents=read.excluded_documents,
        )


def _cut_into_chunks(text: str, tokenizer: Tokenizer, dtype: np.dtype, document: int) -> np.ndarray:
    """Chunk rows of one document."""
    chunk_length = dtype["tokens"].shape[0]
    ids = tokenizer.encode_array(text)
    last = len(ids) + 1  # place of the end token
    rows = np.zeros(last // chunk_length + 1, dtype)
    padded = np.full(len(rows) * chunk_length, tokenizer.pad_id, np.int32)
    padded[0], padded[1:last], padded[last] = tokenizer.bos_id, ids, tokenizer.eos_id
    del ids  # of a long document they are much
    rows["tokens"] = padded.reshape(-1, chunk_length)
    rows["length"] = chunk_length
    rows["length"][-1] = last + 1 - (len(rows) - 1) * chunk_length
    rows["bytes"] = tokenizer.token_bytes[padded].reshape(-1, chunk_length).sum(axis=1)
    rows["document"] = document
    if rows["bytes"].sum(dtype=np.int64) != len(text.encode()):
        raise AssertionError(f"document {document}: bytes of the tokens differ from bytes of the text")
    return rows


def _name_line(document: Document) -> bytes:
    record: dict[str, Any] = {"id": document.id, "group": document.group, "metadata": document.metadata}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


@functools.lru_cache(1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)
