"""Databases that this process holds: a new version is loaded beside the old one, then answers in its place."""

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.holding import Holding
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.wire import Found, Query, RefusedError


class LocalSource:
    """The versions of one database that this process can answer from; see `retro_jax.retrieval.service.source`.

    The newest answers who names none. The one before it stays until nobody has asked for it for a while, so that a
    front can go on with it until every shard has the new one, and a client that is pinned to it can finish.
    """

    def __init__(
        self,
        open_holding: Callable[[], Holding],
        signature: Callable[[], Any],
        *,
        log: Log,
        metrics: Metrics,
        keep_seconds: float = 60.0,
        min_recall: float = 0.0,
    ) -> None:
        """Loads nothing yet.

        Args:
          open_holding: loads and verifies what is there now.
          signature: changes when there is something else.
          log, metrics: told of loads.
          keep_seconds: how long a version that has a successor stays after it was last asked for; at least as long as a
            request may wait, so that none under way loses it.
          min_recall: on stored queries; a version below it is not served.
        """
        self._open = open_holding
        self._signature = signature
        self._log = log
        self._metrics = metrics
        self._keep_seconds = keep_seconds
        self._min_recall = min_recall
        self._seen: Any = None
        self._holdings: tuple[Holding, ...] = ()  # the newest last
        self._used: dict[str, float] = {}
        self._loading = threading.Lock()

    def load(self) -> None:
        """Loads what is there now beside what is held, and lets it answer from then on.

        Raises:
          UserError: it is damaged or no database; what was held goes on answering.
        """
        with self._loading:
            self._seen = self._signature()
            started = time.monotonic()
            holding = self._open()
            version = holding.version
            version.recall = holding.recall()
            if 0 < version.recall < self._min_recall:
                raise UserError(
                    f"recall at k = 2 is {version.recall:.3f} on the stored queries, {self._min_recall} is wanted "
                    "(--min_recall); rebuild the index"
                )
            # A third version would be one too many for the memory: the oldest of three goes at once.
            kept = [old for old in self._holdings if old.version.database != version.database][-1:]
            self._used[version.database] = time.monotonic()
            self._holdings = (*kept, holding)
        self._metrics.loaded(version)
        self._log.event(
            "loaded", database=version.database, shards=list(version.shards), of=version.num_shards,
            chunks=version.chunks, recall=round(version.recall, 4), seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip

    def refresh(self) -> None:
        """Loads when something else is there than was last seen, and lets go what nobody uses any more."""
        if self._signature() != self._seen:
            try:
                self.load()
            except (UserError, OSError) as error:
                self._metrics.reload_failures.inc()
                self._log.event("reload failed", level="error", reason=str(error))
        *old, newest = self._holdings
        limit = time.monotonic() - self._keep_seconds
        idle = [holding for holding in old if self._used[holding.version.database] < limit]
        if idle:
            with self._loading:
                self._holdings = tuple(holding for holding in self._holdings if holding not in idle)
            for holding in idle:
                self._log.event("released", database=holding.version.database, answers=newest.version.database)

    def check_recall(self) -> None:
        """Measures the recall of the newest version again."""
        try:
            self._metrics.recall.set(self._holdings[-1].recall())
        except (UserError, OSError) as error:  # its files may just have been moved away
            self._log.event("recall check failed", level="error", reason=str(error))

    def versions(self) -> list[pb.Version]:
        return [holding.version for holding in self._holdings]

    def version(self, database: str) -> pb.Version:
        return self._holding(database).version

    def using(self, database: str) -> None:
        if any(holding.version.database == database for holding in self._holdings):
            self._used[database] = time.monotonic()

    def search(self, database: str, query: Query, deadline: float) -> Found:
        return self._holding(database).search(query)

    def neighbour_tokens(self, database: str, ids: np.ndarray, deadline: float) -> np.ndarray:
        return self._holding(database).neighbour_tokens(ids)

    def documents(self, database: str, ids: np.ndarray, deadline: float) -> list[tuple[str, str]]:
        return self._holding(database).documents(ids)

    def tokenizer(self, database: str) -> Any:
        return self._holding(database).tokenizer

    def tokenizer_model(self, database: str) -> bytes:
        return self._holding(database).tokenizer_model

    def _holding(self, database: str) -> Holding:
        holdings = self._holdings
        if not holdings:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "the database is being loaded")
        database = database or holdings[-1].version.database
        for holding in holdings:
            if holding.version.database == database:
                self._used[database] = time.monotonic()
                return holding
        newest = holdings[-1].version.database
        raise RefusedError(
            grpc.StatusCode.FAILED_PRECONDITION, f"this server answers from database {newest}, not from {database}"
        )
