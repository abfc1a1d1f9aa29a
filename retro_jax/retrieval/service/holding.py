"""One version of a database in this process: all that the service asks of `retro_jax.retrieval.database`, in one place.

Imports the database's code when the first one is opened, so that a front starts without ScaNN and JAX.
"""

import contextlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.wire import Found, Query


class Holding(Protocol):
    """A version of a database, loaded.

    Attributes:
      version: what it is.
      tokenizer: of its chunks, with `vocab_size` and `decode(ids) -> str`.
      tokenizer_model: bytes of the tokenizer's file.
    """

    version: pb.Version
    tokenizer: Any
    tokenizer_model: bytes

    def search(self, query: Query) -> Found:
        """The nearest chunks in the shards held here."""

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [..., R] of chunk ids [...]."""

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """(id, title) of the document of each chunk id [n]; empty strings for -1."""

    def recall(self) -> float:
        """Recall at k = 2 of the shards held here on stored queries; 0 when none are stored."""


class DatabaseHolding:
    """A database directory of this machine; see `Holding`."""

    def __init__(self, directory: Path, shards: Sequence[int] | None) -> None:
        """Loads shards (all of them when None) and compares every checksum.

        Raises:
          UserError: a part missing, unfinished or damaged, or no such shard.
        """
        from retro_jax.retrieval.database import Database

        database = Database.open(directory, verify=True)
        corpus, index = database.corpus, database.index
        embedder = index.manifest.settings["embedder"]
        self.version = pb.Version(
            database=database.fingerprint,
            corpus=corpus.fingerprint,
            embedder=index.embedder_fingerprint,
            tokenizer=corpus.tokenizer_fingerprint,
            dimension=index.dimension,
            chunk_length=corpus.chunk_length,
            chunks=corpus.num_chunks,
            num_shards=1,
            shards=[0],
            normalized=embedder.get("normalize", False),
            max_length=embedder.get("max_length", 0),
        )
        self._database = database

    @property
    def tokenizer(self) -> Any:
        return self._database.corpus.tokenizer

    @cached_property
    def tokenizer_model(self) -> bytes:
        return self.tokenizer.path.read_bytes()

    def search(self, query: Query) -> Found:
        return Found(*self._database.search(query.vectors, query.k, query.exclude_keys))

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        return self._database.corpus.neighbour_tokens(ids)

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        corpus = self._database.corpus
        records = [None if i < 0 else corpus.document(int(corpus.document_index(i))) for i in ids]
        return [("", "") if record is None else (record.id, record.metadata.get("title", "")) for record in records]

    def recall(self) -> float:
        return 0.0


def open_database(directory: str | os.PathLike, shards: Sequence[int] | None = None) -> DatabaseHolding:
    """Loads the database that a directory, or a link to one, is now."""
    return DatabaseHolding(Path(directory).resolve(), shards)


def signature(directory: str | os.PathLike) -> tuple[Any, ...]:
    """Something that changes when the directory holds another version; cheap enough to ask for every second."""
    resolved = Path(directory).resolve()
    files = [resolved / "corpus" / "manifest.json", resolved / "index" / "manifest.json"]
    marks: list[Any] = [resolved]
    for file in files:
        with contextlib.suppress(OSError):
            status = file.stat()
            marks.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(marks)
