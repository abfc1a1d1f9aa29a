"""The front: asks shard servers, each for its shards, and merges. It learns from them which shards they hold."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.replicas import Backend, Patience, Replicas, ask, check_addresses
from retro_jax.retrieval.service.routing import Routes
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.wire import (
    Found,
    Limits,
    Query,
    RefusedError,
    file_fingerprint,
    keys_bytes,
    merge,
    parse,
    read_found,
    rows,
    vectors_message,
)

_POLL_SECONDS = 1.0
_FILE_SECONDS = 10.0  # for a tokenizer or routers
_DOWN_SECONDS = 3.0  # without an answer to a poll
# Kept back of a request's time, so that the front's own answer arrives in it.
_MARGIN_SHARE, _MARGIN_SECONDS = 0.1, 0.25
_FETCH_ROWS = 16_384
# What a shard server says of the request itself; everything else is the shard's failure.
_OF_THE_REQUEST = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Shards that are asked together, of replicas."""

    shards: tuple[int, ...]
    replicas: Replicas


@dataclasses.dataclass(frozen=True)
class _Offer:
    """A version as the shard servers hold it: disjoint groups, and anyone to fetch chunks from."""

    version: pb.Version
    groups: tuple[_Group, ...]
    anyone: Replicas

    @property
    def missing(self) -> list[int]:
        """Shards that no server holds."""
        return self._beside(self.groups)

    @property
    def silent(self) -> list[int]:
        """Shards that no server holds which can be asked now."""
        return self._beside([group for group in self.groups if group.replicas.up])

    def _beside(self, groups: Sequence[_Group]) -> list[int]:
        held = {shard for group in groups for shard in group.shards}
        return [shard for shard in range(self.version.num_shards) if shard not in held]


class FrontSource:
    """Answers from shard servers; see `retro_jax.retrieval.service.source`.

    The version that answers who names none is one that every shard has; a newer one takes its place as soon as every
    shard has that. A version whose servers are gone is left for one that can be answered from; for an earlier one, in
    which removed documents may still be, only when nobody at all has the later one. All shards of an answer are of one
    version.

    A query goes to the parts that have shards it visits; where the routers are not known, to all.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        security: ClientSecurity,
        patience: Patience,
        limits: Limits,
        log: Log,
        metrics: Metrics,
    ) -> None:
        """Connects to nobody yet; `poll` does.

        Raises:
          UserError: see `check_addresses` and `ClientSecurity.channel`.
        """
        check_addresses(addresses, "a shard server (--backends)")
        self.backends = [Backend(address, security, limits.message_bytes) for address in addresses]
        self._descriptions: dict[Backend, pb.DescribeResponse] = {}
        self._patience = patience
        self._log = log
        self._metrics = metrics
        self._offers: dict[str, _Offer] = {}
        self._current = ""
        self._known_replicas: dict[tuple, Replicas] = {}
        self._left_out: set[tuple[str, tuple[int, ...]]] = set()
        self._routes: dict[str, Routes | None] = {}
        self._tokenizers: dict[str, Any] = {}
        self._models: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def poll(self) -> None:
        """Asks every shard server what it holds, all at a time, for at most a second."""
        request = pb.DescribeRequest(using=self._current).SerializeToString()
        calls = [(backend, backend.start("Describe", request, _POLL_SECONDS)) for backend in self.backends]
        for backend, call in calls:
            try:
                description = parse(pb.DescribeResponse, call.result())
            except (grpc.RpcError, grpc.FutureCancelledError, RefusedError) as error:
                reason = call.details() if isinstance(error, grpc.RpcError) else str(error)
                self._told(backend, reason or "no reason given")
            else:
                # One that still loads is as good as down; what it held before its restart is what it will hold.
                self._told(backend, "draining" if description.draining else "" if description.versions else "loading")
                if description.versions:
                    self._descriptions[backend] = description
            self._metrics.backend_up.labels(backend.address).set(backend.up)
        self._renew()
        self._learn_routes()

    def _told(self, backend: Backend, trouble: str) -> None:
        """Remembers what a poll has shown of a server; no trouble: it can be asked."""
        if trouble and backend.up:
            self._log.event("backend down", level="warning", backend=backend.address, reason=trouble)
        elif not trouble and not (backend.up and backend in self._descriptions):
            self._log.event("backend up", backend=backend.address)
        backend.mark(not trouble, _DOWN_SECONDS)

    @property
    def ready(self) -> bool:
        """A version can be answered from, or could be and somebody is still there to say which shard is missing."""
        return bool(self._current) and any(backend.up for backend in self.backends)

    def versions(self) -> list[pb.Version]:
        if not self._current:
            return []
        offers = self._offers
        others = [fingerprint for fingerprint in offers if fingerprint != self._current]
        return [offers[fingerprint].version for fingerprint in (*others, self._current)]

    def version(self, database: str) -> pb.Version:
        return self._offer(database).version

    def using(self, database: str) -> None:
        pass  # who uses a version searches it, and the shard servers see that

    def search(self, database: str, query: Query, deadline: float) -> Found:
        offer = self._offer(database)
        n = len(query.vectors)
        routes = self._routes.get(offer.version.database)
        visits = np.ones((n, offer.version.num_shards), bool) if routes is None else routes.visits(query)
        visited = visits.any(0)
        asked = [(group, np.flatnonzero(visits[:, group.shards].any(1))) for group in offer.groups]
        asked = [(group, places) for group, places in asked if len(places)]
        messages: dict[bytes, bytes] = {}  # groups that are asked the same share one
        for _, places in asked:
            if (key := places.tobytes()) not in messages:
                messages[key] = _message(offer, query, places)
        requests = [messages[places.tobytes()] for _, places in asked]
        answers = ask([group.replicas for group, _ in asked], "Search", requests, _inner(deadline))
        parts, lost = [], {shard: "no server holds it" for shard in offer.missing if visited[shard]}
        failures = []
        for (group, places), answer in zip(asked, answers, strict=True):
            if isinstance(answer, RefusedError):
                if answer.code in _OF_THE_REQUEST:
                    raise answer
                failures.append(answer)
                lost.update({shard: answer.reason for shard in group.shards if visited[shard]})
            else:
                found = read_found(parse(pb.SearchResponse, answer), len(places), query.k)
                parts.append(found.spread(places, n))
        if lost and not (query.allow_partial and parts):
            overload = failures and all(f.code is grpc.StatusCode.RESOURCE_EXHAUSTED for f in failures)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if overload else grpc.StatusCode.UNAVAILABLE
            first = min(lost)
            more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise RefusedError(code, f"shard {first} of {offer.version.num_shards}{more}: {lost[first]}")
        if lost:
            self._metrics.partial.inc()
        return dataclasses.replace(merge(parts, query.k), missing_shards=tuple(sorted(lost)))

    def neighbour_tokens(self, database: str, ids: np.ndarray, deadline: float) -> np.ndarray:
        offer = self._offer(database)
        width = 2 * offer.version.chunk_length
        flat = np.ascontiguousarray(ids, "<i8").reshape(-1)
        pieces = [
            rows(self._fetch(offer, flat[i : i + _FETCH_ROWS], False, deadline).tokens, "<i4", None, width, "tokens")
            for i in range(0, len(flat), _FETCH_ROWS)
        ]
        return np.concatenate(pieces).reshape(*np.shape(ids), width)

    def documents(self, database: str, ids: np.ndarray, deadline: float) -> list[tuple[str, str]]:
        answer = self._fetch(self._offer(database), np.ascontiguousarray(ids, "<i8"), True, deadline)
        return [(document.id, document.title) for document in answer.documents]

    def tokenizer(self, database: str) -> Any:
        from retro_jax.data.tokenizer import Tokenizer

        fingerprint = self._offer(database).version.tokenizer
        if fingerprint not in self._tokenizers:
            with TemporaryDirectory() as directory:
                path = Path(directory) / "tokenizer.model"
                path.write_bytes(self.tokenizer_model(database))
                self._tokenizers[fingerprint] = Tokenizer(path)
        return self._tokenizers[fingerprint]

    def tokenizer_model(self, database: str) -> bytes:
        offer = self._offer(database)
        fingerprint = offer.version.tokenizer
        if fingerprint not in self._models:
            response = self._describe(offer, pb.DescribeRequest(with_tokenizer=True))
            if file_fingerprint(response.tokenizer_model) != fingerprint:
                raise RefusedError(grpc.StatusCode.UNAVAILABLE, "the shard servers are changing to another tokenizer")
            self._models[fingerprint] = response.tokenizer_model
        return self._models[fingerprint]

    def routers(self, database: str) -> list[pb.Router]:
        return []  # who asks a front need not know

    def close(self) -> None:
        for backend in self.backends:
            backend.close()

    def _offer(self, database: str) -> _Offer:
        offers, current = self._offers, self._current
        if not current:
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, self._why_not_ready())
        offer = offers.get(database or current)
        if offer is None:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION, f"this server answers from database {current}, not from {database}"
            )
        return offer

    def _fetch(self, offer: _Offer, ids: np.ndarray, with_documents: bool, deadline: float) -> pb.FetchResponse:
        request = pb.FetchRequest(ids=ids.tobytes(), database=offer.version.database, with_documents=with_documents)
        answers = ask([offer.anyone], "Fetch", [request.SerializeToString()], _inner(deadline))
        return parse(pb.FetchResponse, _one(answers))

    def _describe(self, offer: _Offer, request: pb.DescribeRequest) -> pb.DescribeResponse:
        answers = ask([offer.anyone], "Describe", [request.SerializeToString()], time.monotonic() + _FILE_SECONDS)
        return parse(pb.DescribeResponse, _one(answers))

    def _why_not_ready(self) -> str:
        if not self._offers:
            return "no shard server has answered yet: " + ", ".join(backend.address for backend in self.backends)
        offer = min(self._offers.values(), key=lambda offer: len(offer.silent))
        silent = ", ".join(map(str, offer.silent))
        return f"of {offer.version.num_shards} shards of database {offer.version.database} no server holds {silent}"

    def _renew(self) -> None:
        """Works out what can be answered from, and whether a newer version takes over."""
        by_version: dict[str, dict[tuple[int, ...], list[Backend]]] = {}
        samples: dict[str, list[pb.Version]] = {}
        for backend, description in self._descriptions.items():
            for version in description.versions:
                by_version.setdefault(version.database, {}).setdefault(tuple(version.shards), []).append(backend)
                samples.setdefault(version.database, []).append(version)
        known, self._known_replicas = self._known_replicas, {}
        offers = {
            fingerprint: self._make_offer(fingerprint, holders, samples[fingerprint], known)
            for fingerprint, holders in by_version.items()
        }
        current = self._choose(offers)
        self._offers = offers
        if current == self._current:
            return
        self._log.event("answers", database=current or None, before=self._current or None)
        self._current = current
        if current:
            self._metrics.loaded(offers[current].version)

    def _make_offer(
        self,
        fingerprint: str,
        holders: dict[tuple[int, ...], list[Backend]],
        samples: list[pb.Version],
        known: dict[tuple, Replicas],
    ) -> _Offer:
        groups: list[_Group] = []
        taken: set[int] = set()

        def preference(held: tuple[tuple[int, ...], list[Backend]]) -> tuple:
            """First what can be asked now, then the widest."""
            shards, backends = held
            return not any(backend.up for backend in backends), -len(shards), shards

        for shards, backends in sorted(holders.items(), key=preference):
            if taken.isdisjoint(shards):
                taken.update(shards)
                name = f"shards {', '.join(map(str, shards))}"
                groups.append(_Group(shards, self._replicas(fingerprint, name, backends, known)))
            elif (fingerprint, shards) not in self._left_out:
                self._left_out.add((fingerprint, shards))
                self._log.event("overlap", level="warning", shards=list(shards), backends=[b.address for b in backends])
        version = pb.Version()
        version.CopyFrom(samples[0])
        version.ClearField("recall")
        if recalls := [sample.recall for sample in samples if sample.HasField("recall")]:
            version.recall = min(recalls)
        del version.shards[:]
        version.shards.extend(sorted(taken))
        everyone = [backend for backends in holders.values() for backend in backends]
        return _Offer(version, tuple(groups), self._replicas(fingerprint, "chunks", everyone, known))

    def _learn_routes(self) -> None:
        """Asks for the routers of versions that have come; without them every query is sent to every part."""
        self._routes = {key: routes for key, routes in self._routes.items() if key in self._offers}
        for fingerprint, offer in self._offers.items():
            if fingerprint in self._routes or not offer.anyone.up:
                continue
            try:
                routers = self._describe(offer, pb.DescribeRequest(with_routers=fingerprint)).routers
                self._routes[fingerprint] = Routes(routers, offer.version) if routers else None
            except RefusedError as error:
                if error.code in _OF_THE_REQUEST:  # it will be no other the next time
                    self._routes[fingerprint] = None
                self._log.event("router unknown", level="warning", database=fingerprint, reason=error.reason)

    def _replicas(
        self, fingerprint: str, name: str, backends: Sequence[Backend], known: dict[tuple, Replicas]
    ) -> Replicas:
        """The same object as long as the servers are the same: it remembers how quick they were."""
        key = (fingerprint, name, tuple(backend.address for backend in backends))
        replicas = known.get(key) or Replicas(name, backends, self._patience, self._metrics)
        self._known_replicas[key] = replicas
        return replicas

    def _choose(self, offers: dict[str, _Offer]) -> str:
        """The version that answers; see the class."""
        # What servers said that are gone since is no hint of where the others go.
        orders = [[v.database for v in told.versions] for b, told in self._descriptions.items() if b.up]
        complete = [fingerprint for fingerprint, offer in offers.items() if not offer.silent]
        current = offers.get(self._current)
        if current is None:
            newest = [order[-1] for order in orders]
            return max(complete, key=newest.count, default="")

        def later(a: str, b: str) -> bool:
            return any(a in order and b in order and order.index(a) > order.index(b) for order in orders)

        for fingerprint in complete:
            if later(fingerprint, self._current) and not later(self._current, fingerprint):
                return fingerprint
        if self._current in complete:
            return self._current
        gone = not current.anyone.up
        return next((other for other in complete if gone or not later(self._current, other)), self._current)


def _inner(deadline: float) -> float:
    """When the shard servers must have answered, for the front's own answer to come by `deadline`."""
    return deadline - min(_MARGIN_SHARE * (deadline - time.monotonic()), _MARGIN_SECONDS)


def _message(offer: _Offer, query: Query, places: np.ndarray) -> bytes:
    """What a shard server is asked: some of the queries, without what the front does by itself."""
    keys = None if query.exclude_keys is None else query.exclude_keys[places]
    return pb.SearchRequest(
        vectors=vectors_message(query.vectors[places], offer.version.embedder),
        k=query.k,
        exclude_keys=keys_bytes(keys, len(places)),
        database=offer.version.database,
    ).SerializeToString()


def _one(answers: list[bytes | RefusedError]) -> bytes:
    (answer,) = answers
    if isinstance(answer, RefusedError):
        code = answer.code if answer.code in _OF_THE_REQUEST else grpc.StatusCode.UNAVAILABLE
        raise RefusedError(code, answer.reason)
    return answer
