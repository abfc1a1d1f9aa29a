"""One version of a database in this process: all that the service asks of `retro_jax.retrieval.database`, in one place.

Imports the database's code when the first one is opened: a front needs none of it.
"""

import dataclasses
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.routing import router_messages
from retro_jax.retrieval.service.wire import Found, Query, invalid


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
        """int32 [..., R] of chunk ids [...]; raises `RefusedError` for one of a removed document."""

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """(id, title) of the document of each chunk id [n], empty strings for -1; raises as `neighbour_tokens`."""

    def routers(self) -> list[pb.Router]:
        """Of each part of the index; empty where every query visits every shard."""

    def recall(self) -> float | None:
        """Recall at k = 2 of the shards held here on stored queries; None when none are stored."""


class DatabaseHolding:
    """A database directory of this machine; see `Holding`."""

    def __init__(self, directory: Path, chosen: "ChosenShards") -> None:
        """Loads shards and compares their checksums.

        Raises:
          UserError: a part missing, unfinished or damaged, or no such shard.
        """
        from retro_jax.retrieval.database import Database

        database = Database.open(directory, index_shards=chosen.of(directory), verify=True)
        description = database.describe()
        embedder = description["embedder_settings"]
        self.version = pb.Version(
            database=database.fingerprint,
            corpus=description["corpus"],
            embedder=database.embedder_fingerprint,
            tokenizer=description["tokenizer"],
            dimension=database.dimension,
            chunk_length=description["chunk_length"],
            chunks=description["chunks"],
            num_shards=database.num_index_shards,
            shards=database.index_shards,
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
        return Found(*self._database.search_found(query.vectors, query.k, query.exclude_keys))

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        self._require_present(ids)
        return self._database.neighbour_tokens(ids)

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        self._require_present(ids)
        return self._database.documents(ids)

    def routers(self) -> list[pb.Router]:
        return router_messages(self._database.indexes)

    def recall(self) -> float | None:
        from retro_jax.retrieval.service.self_check import recall

        return recall(self._database.indexes)

    def _require_present(self, ids: np.ndarray) -> None:
        # The library reads them for what was made before the removal; who asks a service gets them no more.
        gone = np.extract(self._database.corpus.removed(ids), ids)
        if gone.size:
            raise invalid(f"chunk {gone[0]} is of a document that was removed")


@dataclasses.dataclass(frozen=True)
class ChosenShards:
    """Which shards of a database a server holds: `numbers`, or every `step`-th from `first`, so that it also covers the
    shards of later additions; all of them by default."""

    numbers: tuple[int, ...] | None = None
    first: int = 0
    step: int = 1

    @classmethod
    def parse(cls, text: str) -> "ChosenShards":
        """Of "0,2,5", or "0/2": every second one from 0.

        Raises:
          UserError: neither.
        """
        try:
            if "/" in text:
                first, step = map(int, text.split("/"))
                if 0 <= first < step:
                    return cls(None, first, step)
            else:
                return cls(tuple(sorted({int(number) for number in text.split(",")})))
        except ValueError:
            pass
        raise UserError(f"shards are numbers like 0,2,5 or a part like 0/2, not {text!r}")

    def of(self, directory: Path) -> list[int] | None:
        """The numbers in this database, None for all."""
        from retro_jax.retrieval.index import Index
        from retro_jax.retrieval.segments import ADDITIONS, Segments

        if self.numbers is not None or self.step == 1:
            return self.numbers if self.numbers is None else list(self.numbers)
        folders = [directory, *(directory / ADDITIONS / name for name in Segments.load(directory).additions)]
        count = sum(Index.count_shards(folder / "index") for folder in folders)
        return list(range(self.first, count, self.step))


def open_database(directory: str | os.PathLike, chosen: ChosenShards) -> DatabaseHolding:
    """Loads the database that a directory, or a link to one, is now.

    Raises:
      UserError: see `DatabaseHolding`.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a database with corpus/ and index/ in it")
    return DatabaseHolding(directory.resolve(), chosen)
