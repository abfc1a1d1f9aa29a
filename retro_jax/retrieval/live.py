"""A database that is followed while it is used: after a change it is opened again and answers from what it is then."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retro_jax.retrieval.database import Database, Neighbours
from retro_jax.retrieval.segments import signature

if TYPE_CHECKING:
    from retro_jax.retrieval.embedder import Embedder


class LiveDatabase:
    """A database directory, or a link to one, for a process that runs on while documents come and go.

    All answers between two calls of `refresh` are from one version, so a text that is begun with it is ended with it.
    Chunk ids are of that version; only a compacted database numbers its chunks anew.
    """

    def __init__(self, directory: str | os.PathLike, embedder: "Embedder") -> None:
        """Opens what is there now.

        Raises:
          UserError: see `Database.open`.
        """
        self._directory = Path(directory)
        self._embedder = embedder
        self._fingerprint = self._open().fingerprint

    @property
    def current(self) -> Database:
        """The version that answers.

        Raises:
          UserError: the last `refresh` found something that is no sound database, and it still is none.
        """
        return self._opened or self._open()

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer its chunks were made with."""
        return self.current.corpus.tokenizer_fingerprint

    def refresh(self) -> bool:
        """Answers from what the database is now, from here on. Gives whether that is another version than before.

        Raises:
          UserError: it is damaged, or made with another embedder; the version before answers no more then.
        """
        if self._opened is not None and signature(self._directory) == self._seen:
            return False
        before, self._fingerprint = self._fingerprint, self._open().fingerprint
        return self._fingerprint != before

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> Neighbours:
        """As `Database.retrieve`."""
        return self.current.retrieve(chunk_tokens, k)

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """As `Database.documents`."""
        return self.current.documents(ids)

    def _open(self) -> Database:
        self._opened: Database | None = None
        self._seen = signature(self._directory)  # before anything is read: a change meanwhile is noticed the next time
        # The link is resolved once: one that is switched meanwhile must not mix two databases.
        opened = self._opened = Database.open(self._seen[0], self._embedder)
        return opened
