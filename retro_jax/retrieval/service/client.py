"""The client library: one object for a process, used by many threads.

    with RetrievalClient("front:50051", security=ClientSecurity(ca=Path("ca.pem"))) as client:
        ids, distances = client.search(vectors, k=2)

Connections are kept. A process that forks makes its clients after the fork.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service import wire
from retro_jax.retrieval.service.replicas import Backend, Patience, Replicas, ask, check_addresses
from retro_jax.retrieval.service.security import ClientSecurity
from retro_jax.retrieval.service.wire import Found, Limits, RefusedError

_WAIT_STEP = 0.2


class RetrievalError(UserError):
    """A call that has no answer.

    Attributes:
      code: gRPC status.
    """

    def __init__(self, message: str, code: grpc.StatusCode) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """What was retrieved for n chunks: ids int64 [n, K] (-1), distances float32 [n, K], tokens int32 [n, K, R]."""

    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Description:
    """What is served.

    Attributes:
      database, corpus, embedder, tokenizer: fingerprints.
      dimension: E.
      chunk_length: M.
      chunks: how many the database has.
      num_shards: of its index.
      embeds: texts and tokens can be searched.
    """

    database: str
    corpus: str
    embedder: str
    tokenizer: str
    dimension: int
    chunk_length: int
    chunks: int
    num_shards: int
    embeds: bool


class RetrievalClient:
    """Searches a database that is served; see the module's docstring.

    All answers come from one version of the database: the one that `database` names, else the one that was served
    when the client first asked. A server that has only another one is refused.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        database: str | None = None,
        security: ClientSecurity | None = None,
        seconds: float = 30.0,
        patience: Patience | None = None,
        allow_partial: bool = False,
        concurrent: int = 2,
    ) -> None:
        """Connects when first used.

        Args:
          addresses: "host:port" of servers that give the same answers (one, or several fronts), with commas or a list.
          database: fingerprint that must answer.
          security: TLS and token; None is plaintext.
          seconds: deadline of one call, retries included.
          patience: retries and hedging; by default a search or a fetch that somebody may answer later goes on until its
            deadline, and a few attempts tell that nobody is there.
          allow_partial: take answers that miss shards; `search_found` says which.
          concurrent: requests under way at a time when one search needs several.

        Raises:
          UserError: no addresses, or see `ClientSecurity.channel`.
        """
        if isinstance(addresses, str):
            addresses = addresses.split(",")
        check_addresses(addresses, "a service")
        self._seconds = seconds
        self._allow_partial = allow_partial
        self._pinned = database or ""
        backends = [Backend(address, security or ClientSecurity(), Limits().message_bytes) for address in addresses]
        self._name = ",".join(addresses)
        self._replicas = Replicas(self._name, backends, patience or Patience(attempts=None), None)
        # Whether anybody is there at all is soon known, so that a wrong address does not cost a whole deadline.
        self._describing = Replicas(self._name, backends, patience or Patience(attempts=8), None)
        self._described: tuple[Description, pb.Limits] | None = None
        self._answers = ""  # fingerprint of the database described last
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(concurrent, thread_name_prefix="retrieval")

    def __enter__(self) -> "RetrievalClient":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._pool.shutdown(cancel_futures=True)
        for backend in self._replicas.backends:
            backend.close()

    @property
    def description(self) -> Description:
        """What is served, asked once.

        Raises:
          RetrievalError: nobody answers, nothing is loaded yet, or another database than the pinned one.
        """
        return self._describe()[0]

    @property
    def fingerprint(self) -> str:
        """Of the database that answers."""
        return self.description.database

    @property
    def tokenizer_fingerprint(self) -> str:
        """Of the tokenizer that the database's chunks were made with."""
        return self.description.tokenizer

    def refresh(self) -> bool:
        """Answers come from what is served now, from here on. Gives whether that is another version than before.

        A client that names its database stays with it.

        Raises:
          RetrievalError: nobody answers; the version before answers no more then.
        """
        with self._lock:
            before, self._described = self._answers, None
        return self.fingerprint != before

    def wait_until_ready(self, seconds: float) -> Description:
        """Asks until a database is served, for a service that is just starting.

        Raises:
          RetrievalError: it is not after so many seconds.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                return self.description
            except RetrievalError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                    raise
                time.sleep(_WAIT_STEP)

    def search(
        self, vectors: np.ndarray, k: int, exclude_keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `Database.search`: ids int64 [n, K] (-1) and squared distances float32 [n, K] (+inf) of vectors [n, E].

        Raises:
          RetrievalError: what the service says, or that it does not answer.
        """
        found = self.search_found(vectors, k, exclude_keys)
        return found.ids, found.distances

    def search_found(self, vectors: np.ndarray, k: int, exclude_keys: np.ndarray | None = None) -> Found:
        """The same with the number of excluded chunks that were nearer, and the shards that did not answer."""
        description, limits = self._describe()
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2:
            raise UserError(f"queries have shape {vectors.shape}, expected [n, {description.dimension}]")
        keys = None if exclude_keys is None else np.asarray(exclude_keys, np.int64).reshape(len(vectors), -1)

        def one(start: int, stop: int) -> Found:
            part = vectors[start:stop]
            request = pb.SearchRequest(
                vectors=wire.vectors_message(part, description.embedder),
                k=k,
                exclude_keys=wire.keys_bytes(None if keys is None else keys[start:stop], len(part)),
                database=description.database,
                allow_partial=self._allow_partial,
            )
            return self._found(request, len(part))[0]

        return self._in_parts(one, len(vectors), k, self._rows_at_once(limits, k))

    def retrieve(self, chunk_tokens: np.ndarray, k: int) -> Neighbours:
        """The k neighbours by value of chunks [n, M] of tokens of the database's tokenizer; the service embeds them.

        Raises:
          RetrievalError: the service has no embedder, or see `search`.
        """
        description, limits = self._describe()
        chunks = np.ascontiguousarray(chunk_tokens, "<i4")
        width = 2 * description.chunk_length
        tokens = np.empty((len(chunks), k, width), np.int32)

        def one(start: int, stop: int) -> Found:
            request = pb.SearchRequest(
                tokens=pb.Tokens(
                    values=chunks[start:stop].tobytes(),
                    chunk_length=chunks.shape[1],
                    tokenizer=description.tokenizer,
                ),
                k=k,
                database=description.database,
                allow_partial=self._allow_partial,
                with_tokens=True,
            )
            found, values = self._found(request, stop - start)
            tokens[start:stop] = wire.rows(values, "<i4", (stop - start) * k, width, "tokens").reshape(-1, k, width)
            return found

        found = self._in_parts(one, len(chunks), k, self._rows_at_once(limits, k, 4 * width))
        return Neighbours(found.ids, found.distances, tokens)

    def search_texts(self, texts: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and distances [n, K] of the chunks nearest to n texts; the service embeds them."""
        description, limits = self._describe()

        def one(start: int, stop: int) -> Found:
            request = pb.SearchRequest(
                texts=pb.Texts(values=texts[start:stop]),
                k=k,
                database=description.database,
                allow_partial=self._allow_partial,
            )
            return self._found(request, stop - start)[0]

        found = self._in_parts(one, len(texts), k, self._rows_at_once(limits, k))
        return found.ids, found.distances

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [..., R]: chunks [...] and their continuations; PAD for -1 and where a document ends."""
        width = 2 * self.description.chunk_length
        response = self._fetch(np.asarray(ids).reshape(-1), documents=False)
        return wire.rows(response.tokens, "<i4", np.size(ids), width, "tokens").reshape(*np.shape(ids), width)

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """(id, title) of the document of every chunk id [n]; empty for -1."""
        response = self._fetch(np.asarray(ids).reshape(-1), documents=True)
        return [(document.id, document.title) for document in response.documents]

    def _describe(self) -> tuple[Description, pb.Limits]:
        with self._lock:
            if self._described is None:
                request = pb.DescribeRequest(using=self._pinned).SerializeToString()
                response = pb.DescribeResponse.FromString(self._ask("Describe", request, self._describing))
                if not response.versions:
                    raise RetrievalError(f"{self._name}: nothing is loaded yet", grpc.StatusCode.UNAVAILABLE)
                served = {version.database: version for version in response.versions}
                version = served.get(self._pinned) if self._pinned else response.versions[-1]
                if version is None:
                    raise RetrievalError(
                        f"{self._name} serves database {response.versions[-1].database}, not {self._pinned}",
                        grpc.StatusCode.FAILED_PRECONDITION,
                    )
                names = [field.name for field in dataclasses.fields(Description) if field.name != "embeds"]
                values = {name: getattr(version, name) for name in names}
                self._described = Description(**values, embeds=response.embeds), response.limits
                self._answers = version.database
            return self._described

    def _found(self, request: pb.SearchRequest, n: int) -> tuple[Found, bytes]:
        """An answer's arrays, and its bytes of tokens."""
        response = pb.SearchResponse.FromString(self._ask("Search", request.SerializeToString(), self._replicas))
        self._check_database(response.database, request.database)
        return wire.read_found(response, n, request.k), response.tokens

    def _fetch(self, ids: np.ndarray, *, documents: bool) -> pb.FetchResponse:
        description, limits = self._describe()
        parts = []
        # The shortest answer that fits whatever the limits are: tokens of R values, or an id and a title.
        step = max(1, min(limits.chunks, limits.message_bytes // (16 * description.chunk_length + 1024)))
        for start in range(0, max(len(ids), 1), step):
            request = pb.FetchRequest(
                ids=np.ascontiguousarray(ids[start : start + step], "<i8").tobytes(),
                database=description.database,
                with_documents=documents,
            )
            response = pb.FetchResponse.FromString(self._ask("Fetch", request.SerializeToString(), self._replicas))
            self._check_database(response.database, description.database)
            parts.append(response)
        return pb.FetchResponse(
            tokens=b"".join(part.tokens for part in parts),
            documents=[document for part in parts for document in part.documents],
        )

    def _check_database(self, answered: str, wanted: str) -> None:
        if answered != wanted:
            raise RetrievalError(
                f"{self._name} answered from database {answered}, this client uses {wanted}",
                grpc.StatusCode.FAILED_PRECONDITION,
            )

    def _ask(self, method: str, request: bytes, replicas: Replicas) -> bytes:
        (answer,) = ask([replicas], method, [request], time.monotonic() + self._seconds)
        if isinstance(answer, RefusedError):
            raise RetrievalError(f"{self._name}: {answer.code.name}: {answer.reason}", answer.code)
        return answer

    def _rows_at_once(self, limits: pb.Limits, k: int, row_bytes: int = 0) -> int:
        """Queries that one request may have."""
        by_answer = (limits.message_bytes - (2 << 20)) // (max(k, 1) * (12 + row_bytes))
        return max(1, min(limits.queries, limits.results // max(k, 1), by_answer))

    def _in_parts(self, one: Any, n: int, k: int, step: int) -> Found:
        """Asks for `one(start, stop)` of all n rows, several at a time, and joins them in order."""
        starts = range(0, n, step)
        if not starts:
            return Found(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
        if len(starts) == 1:
            return one(0, n)
        parts = list(self._pool.map(lambda start: one(start, min(start + step, n)), starts))
        return Found(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.distances for part in parts]),
            sum(part.dropped for part in parts),
            tuple(sorted({shard for part in parts for shard in part.missing_shards})),
        )
