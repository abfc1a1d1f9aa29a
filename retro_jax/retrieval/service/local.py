"""Databases that this process holds: a new version is loaded beside the old one, then answers in its place."""

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

_FIRST_PAUSE, _LONGEST_PAUSE = 5.0, 300.0  # seconds before what could not be loaded is tried again; doubled each time


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
        """Loads nothing yet. `load`, `refresh` and `check_recall` are for one thread, the rest for all.

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
        self._loaded: Any = None  # signatures: of what was loaded last, could not be loaded, has to wait
        self._failed: Any = None
        self._waiting: Any = None
        self._pause = _FIRST_PAUSE
        self._retry_at = 0.0
        self._holdings: tuple[Holding, ...] = ()  # the newest last
        self._used: dict[str, float] = {}

    def load(self) -> None:
        """Loads what is there now beside what is held, and lets it answer from then on.

        Raises:
          UserError: it is damaged or no database; what was held goes on answering.
        """
        signature = self._signature()
        started = time.monotonic()
        holding = self._open()
        version = holding.version
        recall = holding.recall()
        if recall is not None:
            if recall < self._min_recall:
                raise UserError(
                    f"recall at k = 2 is {recall:.3f} on the stored queries, {self._min_recall} is wanted "
                    "(--min_recall); rebuild the index"
                )
            version.recall = recall
        kept = [old for old in self._holdings if old.version.database != version.database]
        self._used[version.database] = time.monotonic()
        self._holdings = (*kept, holding)
        self._loaded = signature
        self._metrics.loaded(version)
        self._log.event(
            "loaded", database=version.database, shards=list(version.shards), of=version.num_shards,
            chunks=version.chunks, recall=None if recall is None else round(recall, 4),
            seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip

    def refresh(self, *, at_once: bool = False) -> None:
        """Lets go what nobody uses any more, and loads when something else is there than was loaded last.

        What could not be loaded is tried again after pauses that grow, since a file may be mended in its place. Three
        versions are never held: a third waits until nobody has asked for one of the two for a while.

        Args:
          at_once: tries again now what failed, and has the older of two versions go though somebody uses it.
        """
        self._release()
        there = None
        try:
            there = self._signature()
            if there == self._loaded or not (at_once or there != self._failed or time.monotonic() >= self._retry_at):
                return
            if self._make_room(there, at_once):
                self.load()
                self._failed = None
        except Exception as error:  # whatever it is, what is held can answer
            self._pause = min(2 * self._pause, _LONGEST_PAUSE) if there == self._failed else _FIRST_PAUSE
            self._failed, self._retry_at = there, time.monotonic() + self._pause
            self._metrics.reload_failures.inc()
            self._log.event("reload failed", level="error", reason=_reason(error), again_in=self._pause)

    def check_recall(self) -> None:
        """Measures the recall of the newest version again."""
        try:
            self._metrics.set_recall(self._holdings[-1].recall())
        except Exception as error:  # its files may just have been moved away
            self._log.event("recall check failed", level="error", reason=_reason(error))

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

    def routers(self, database: str) -> list[pb.Router]:
        return self._holding(database).routers()

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

    def _idle(self, holding: Holding) -> bool:
        return self._used[holding.version.database] < time.monotonic() - self._keep_seconds

    def _release(self) -> None:
        for holding in self._holdings[:-1]:
            if self._idle(holding):
                self._let_go(holding)

    def _make_room(self, there: Any, at_once: bool) -> bool:
        """Whether one version at most is held now; of two, one that nobody uses goes, be it the newer."""
        if len(self._holdings) < 2:
            return True
        idle = [holding for holding in self._holdings if self._idle(holding)]
        if not idle and not at_once:
            if there != self._waiting:
                self._waiting = there
                used = [holding.version.database for holding in self._holdings]
                self._log.event("reload waits", level="warning", used=used)
            return False
        self._let_go((idle or self._holdings)[0])
        return True

    def _let_go(self, holding: Holding) -> None:
        newest = self._holdings[-1]
        self._holdings = tuple(held for held in self._holdings if held is not holding)
        answers = self._holdings[-1].version
        if holding is newest:
            self._loaded = None
            self._metrics.loaded(answers)
        self._log.event("released", database=holding.version.database, answers=answers.database)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
