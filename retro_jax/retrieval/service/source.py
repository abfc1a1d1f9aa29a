"""What a server answers from: databases of its own (`local`), or shard servers that it asks (`front`)."""

from typing import Any, Protocol

import numpy as np

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.wire import Found, Query


class Source(Protocol):
    """Where answers come from. `database` is a fingerprint, or empty for the newest; `deadline` is of time.monotonic.

    Every method raises `Refused` when there is no answer: UNAVAILABLE while nothing is loaded or nobody reachable,
    FAILED_PRECONDITION for a database that is not held.
    """

    def versions(self) -> list[pb.Version]:
        """What can be asked for, the newest last; empty while nothing is loaded."""

    def version(self, database: str) -> pb.Version:
        """The version of that fingerprint."""

    def using(self, database: str) -> None:
        """Somebody goes on using this version."""

    def search(self, database: str, query: Query, deadline: float) -> Found:
        """The nearest chunks of checked queries."""

    def neighbour_tokens(self, database: str, ids: np.ndarray, deadline: float) -> np.ndarray:
        """int32 [..., R] of chunk ids [...]."""

    def documents(self, database: str, ids: np.ndarray, deadline: float) -> list[tuple[str, str]]:
        """(id, title) of each chunk's document."""

    def tokenizer(self, database: str) -> Any:
        """The tokenizer of its chunks."""

    def tokenizer_model(self, database: str) -> bytes:
        """The tokenizer's file."""

    def routers(self, database: str) -> list[pb.Router]:
        """Of each part of its index; empty where every query visits every shard."""
