"""The calls of the service: check, wait for a slot, answer from the source, count."""

import dataclasses
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc
import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service import wire
from retro_jax.retrieval.service.admission import Admission, QueueFullError, Ticket, TooLateError
from retro_jax.retrieval.service.embedding import Embedding
from retro_jax.retrieval.service.log import Log
from retro_jax.retrieval.service.metrics import Metrics
from retro_jax.retrieval.service.security import ServerSecurity
from retro_jax.retrieval.service.source import Source
from retro_jax.retrieval.service.wire import Limits, Query, RefusedError

_LONGEST_ID = 64
_BLOCK = 256  # texts embedded before it is asked again whether anybody still waits for them
_Answer = Callable[[bytes, grpc.ServicerContext], bytes]


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A slot that is held for a request, and its deadline, of time.monotonic."""

    deadline: float
    ticket: Ticket

    def require_time(self) -> None:
        """Raises TooLateError when the time is over or the caller gone."""
        if self.ticket.cancelled or time.monotonic() >= self.deadline:
            raise TooLateError


class Calls:
    """Answers Describe, Search and Fetch.

    Attributes:
      draining: said to who asks; set when the server is about to stop.
    """

    def __init__(
        self,
        source: Source,
        *,
        limits: Limits,
        admission: Admission,
        security: ServerSecurity,
        log: Log,
        metrics: Metrics,
        embedding: Embedding | None = None,
        log_requests: bool = False,
    ) -> None:
        """Sets what is answered from and within which bounds; `log_requests` logs the successful ones too."""
        self.draining = False
        self._source = source
        self._limits = limits
        self._admission = admission
        self._security = security
        self._log = log
        self._metrics = metrics
        self._embedding = embedding
        self._log_requests = log_requests

    def handler(self) -> grpc.GenericRpcHandler:
        """For `grpc.Server.add_generic_rpc_handlers`; messages are parsed here, so that bad bytes have a reason."""
        methods = {"Describe": self._describe, "Search": self._search, "Fetch": self._fetch}
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {name: grpc.unary_unary_rpc_method_handler(self._guarded(name, f)) for name, f in methods.items()},
        )

    def _guarded(self, method: str, answer: _Answer) -> _Answer:
        """Turns what is raised into a status, and counts and logs every call."""

        def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
            started = time.perf_counter()
            code, reason = grpc.StatusCode.OK, ""
            wire.REQUEST_ID.set(_request_id(context))
            try:
                if not self._security.admits(context.invocation_metadata()):
                    raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "no token, or one that is not known here")
                result = answer(data, context)
            except RefusedError as refused:
                code, reason = refused.code, refused.reason
            except UserError as error:
                code, reason = grpc.StatusCode.INVALID_ARGUMENT, str(error)
            except Exception as error:
                # The message of an exception may hold what was sent; where it was raised does not.
                code, reason = grpc.StatusCode.INTERNAL, f"{type(error).__name__} in the server; its log says where"
                frames = traceback.extract_tb(error.__traceback__)
                places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
                self._log.event("defect", level="error", method=method, kind=type(error).__name__, at=places)
            seconds = time.perf_counter() - started
            self._metrics.requests.labels(method, code.name).inc()
            self._metrics.seconds.labels(method).observe(seconds)
            if code is not grpc.StatusCode.OK or self._log_requests:
                self._log.event(
                    f"{method} {code.name}",
                    level="info" if code is grpc.StatusCode.OK else "warning",
                    request=wire.REQUEST_ID.get(),
                    peer=context.peer(),
                    bytes=len(data),
                    ms=round(1000 * seconds, 3),
                    **({"reason": reason} if reason else {}),
                )
            if code is not grpc.StatusCode.OK:
                context.abort(code, reason)
            return result

        return handle

    def _describe(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        request = wire.parse(pb.DescribeRequest, data)
        versions = self._source.versions()
        if request.using:
            self._source.using(request.using)
        return pb.DescribeResponse(
            versions=versions,
            limits=self._limits.message(),
            embeds=self._embedding is not None,
            draining=self.draining,
            tokenizer_model=self._source.tokenizer_model("") if request.with_tokenizer and versions else b"",
            routers=self._source.routers(request.with_routers) if request.with_routers else [],
        ).SerializeToString()

    def _search(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        request = wire.parse(pb.SearchRequest, data)
        version = self._source.version(request.database)
        queries = wire.queries(request, version)
        if self._embedding is None and not request.HasField("vectors"):
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION, "this server has no embedder (--embedder); search by vectors"
            )
        n = len(queries)
        keys = wire.check_counts(request, n, self._limits)
        width = 2 * version.chunk_length if request.with_tokens else 0
        wire.check_answer_size(n * request.k, 12 + 4 * width, self._limits)
        self._metrics.queries.observe(n)
        with self._slot(n, context) as turn:
            query = Query(self._vectors(request, queries, version, turn), request.k, keys, request.allow_partial)
            turn.require_time()
            found = self._source.search(version.database, query, turn.deadline)
            tokens = self._source.neighbour_tokens(version.database, found.ids, turn.deadline) if width else None
        return wire.found_message(found, version, tokens).SerializeToString()

    def _fetch(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        request = wire.parse(pb.FetchRequest, data)
        version = self._source.version(request.database)
        ids = wire.check_ids(request, version, self._limits)
        wire.check_answer_size(len(ids), 8 * version.chunk_length + 512 * request.with_documents, self._limits)
        with self._slot(1, context) as turn:
            tokens = self._source.neighbour_tokens(version.database, ids, turn.deadline)
            named = self._source.documents(version.database, ids, turn.deadline) if request.with_documents else []
        return pb.FetchResponse(
            database=version.database,
            tokens=np.ascontiguousarray(tokens, "<i4").tobytes(),
            documents=[pb.Document(id=identity, title=title) for identity, title in named],
        ).SerializeToString()

    def _vectors(
        self, request: pb.SearchRequest, queries: np.ndarray | Sequence[str], version: pb.Version, turn: _Turn
    ) -> np.ndarray:
        """Float32 [n, E] of `wire.queries`. All that costs time for every query is done here, behind the queue."""
        if request.HasField("vectors"):
            return wire.check_vectors(queries)
        if request.HasField("texts"):
            texts = wire.check_texts(queries, self._limits)
        else:
            tokenizer = self._source.tokenizer(version.database)
            texts = [tokenizer.decode(row) for row in wire.check_tokens(queries, tokenizer.vocab_size).tolist()]
        blocks = []
        for start in range(0, len(texts), _BLOCK):
            turn.require_time()
            blocks.append(self._embedding.vectors(texts[start : start + _BLOCK], version))
        return np.concatenate(blocks)

    @contextmanager
    def _slot(self, queries: int, context: grpc.ServicerContext) -> Iterator[_Turn]:
        """Waits for a slot as long as the caller does; what raises TooLateError in it ends like a wait in vain."""
        remaining = context.time_remaining()
        seconds = self._limits.seconds if remaining is None else min(remaining, self._limits.seconds)
        deadline = time.monotonic() + seconds
        ticket = Ticket(queries)
        if not context.add_callback(ticket.cancel):
            ticket.cancel()  # it has gone already
        arrived = time.perf_counter()
        try:
            with self._admission.slot(ticket, seconds):
                self._metrics.waited.observe(time.perf_counter() - arrived)
                yield _Turn(deadline, ticket)
        except QueueFullError:
            self._metrics.shed.inc()
            waiting, of = self._admission.waiting, self._admission.waiting_queries
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"the queue is full ({waiting} requests, {of} queries); try later"
            ) from None
        except TooLateError:
            self._metrics.late.inc()
            raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "no time left before the search began") from None


def _request_id(context: grpc.ServicerContext) -> str:
    """The caller's own, when it is short and printable; else one of ours."""
    for key, value in context.invocation_metadata():
        if (
            key == wire.REQUEST_ID_HEADER
            and isinstance(value, str)
            and value.isprintable()
            and len(value) <= _LONGEST_ID
        ):
            return value
    return uuid.uuid4().hex[:16]
