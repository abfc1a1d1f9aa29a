"""Texts to vectors inside the server, with the embedder that made the database. Needs JAX and TensorFlow Text."""

import os
import threading

import grpc
import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.wire import RefusedError


class Embedding:
    """The embedder of the databases that are served, loaded for the first of them."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Loads nothing yet.

        Args:
          path: checkpoint directory or hub id.
        """
        self._path = path
        self._embedder = None
        self._lock = threading.Lock()

    def load(self, version: pb.Version) -> None:
        """Loads the embedder with the settings of this version, and runs it once.

        Raises:
          UserError: no checkpoint, or not the one that the database was made with.
        """
        from retro_jax.retrieval.embedder import Embedder

        with self._lock:
            if self._embedder is not None:
                return
            embedder = Embedder.load(self._path, normalize=version.normalized, max_length=version.max_length)
            if embedder.fingerprint != version.embedder:
                raise UserError(
                    f"{self._path} is embedder {embedder.fingerprint}, the database was embedded with "
                    f"{version.embedder}: give the same checkpoint"
                )
            embedder.embed(["so that the first caller does not wait for the compiler"])
            self._embedder = embedder

    def vectors(self, texts: list[str], version: pb.Version) -> np.ndarray:
        """float32 [n, E]; zeros for a text without word pieces.

        Raises:
          RefusedError: the database was made with another embedder.
        """
        if self._embedder is None or self._embedder.fingerprint != version.embedder:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the embedder of this server is not the one of database {version.database}; search by vectors",
            )
        return self._embedder.embed(texts).vectors
