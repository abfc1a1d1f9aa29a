"""What goes over the wire: names of the calls, arrays as bytes, and the checks that every request must pass.

A request that fails a check is answered with the status and reason of a `RefusedError`. Reasons name places and
numbers, never the text that was sent.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TypeVar

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from retro_jax.retrieval.index import merge as merge_answers
from retro_jax.retrieval.service import retrieval_v1_pb2 as pb

# Of the call that this thread answers; goes on to the servers that it asks meanwhile.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
REQUEST_ID_HEADER = "x-request-id"
SERVICE = pb.DESCRIPTOR.services_by_name["Retrieval"].full_name
_MessageT = TypeVar("_MessageT", bound=Message)
_OVERHEAD_BYTES = 1 << 20  # of a message besides its largest array


class RefusedError(Exception):
    """A call is answered with this status instead of a result.

    Attributes:
      code: gRPC status.
      reason: one line for the caller.
    """

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask; more is refused with INVALID_ARGUMENT.

    Attributes:
      queries: n.
      neighbours: k.
      results: n times k, over all queries of a request.
      excluded: X, document keys a query.
      chunks: ids in one Fetch.
      text_bytes: UTF-8 bytes of one text.
      message_bytes: of a request or an answer.
      seconds: longest deadline; a request without one gets it.
    """

    queries: int = 4096
    neighbours: int = 1000
    results: int = 1 << 20
    excluded: int = 64
    chunks: int = 65_536
    text_bytes: int = 1 << 16
    message_bytes: int = 64 << 20
    seconds: float = 60.0

    def message(self) -> pb.Limits:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return pb.Limits(**fields)


@dataclasses.dataclass(frozen=True)
class Query:
    """A search that passed the checks: vectors float32 [n, E], k, excluded document keys int64 [n, X] or None."""

    vectors: np.ndarray
    k: int
    exclude_keys: np.ndarray | None
    allow_partial: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search gives: ids int64 [n, k] (-1), distances float32 [n, k] (+inf), and what it was found in.

    Attributes:
      dropped: nearer chunks that were excluded.
      missing_shards: shards that did not answer.
    """

    ids: np.ndarray
    distances: np.ndarray
    dropped: int = 0
    missing_shards: tuple[int, ...] = ()

    def spread(self, places: np.ndarray, n: int) -> "Found":
        """The same as an answer to n queries of which these were asked; nothing is found for the others."""
        if len(places) == n:
            return self
        k = self.ids.shape[1]
        ids, distances = np.full((n, k), -1, np.int64), np.full((n, k), np.inf, np.float32)
        ids[places], distances[places] = self.ids, self.distances
        return Found(ids, distances, self.dropped, self.missing_shards)


def parse(kind: type[_MessageT], data: bytes) -> _MessageT:
    """A message of this kind.

    Raises:
      RefusedError: the bytes are none.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RefusedError(
            grpc.StatusCode.INVALID_ARGUMENT, f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}"
        ) from None


def rows(data: bytes, dtype: str, count: int | None, width: int, name: str) -> np.ndarray:
    """Little-endian rows [count, width] of a bytes field; any whole number of them when count is None.

    Raises:
      RefusedError: the bytes do not make such rows.
    """
    size = np.dtype(dtype).itemsize * width
    expected = "whole rows" if count is None else f"{count} rows"
    if len(data) % size or (count is not None and len(data) != count * size):
        raise invalid(f"{name} has {len(data)} bytes, expected {expected} of {size} bytes")
    return np.frombuffer(data, dtype).reshape(-1, width)


def invalid(reason: str) -> RefusedError:
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, reason)


def check_counts(request: pb.SearchRequest, n: int, limits: Limits) -> np.ndarray | None:
    """Checks n queries and k against the limits; gives the excluded keys int64 [n, X] or None.

    Raises:
      RefusedError: naming what is out of range.
    """
    if not 1 <= n <= limits.queries:
        raise invalid(f"{n} queries; a request has 1 to {limits.queries}")
    if not 1 <= request.k <= limits.neighbours:
        raise invalid(f"k is {request.k}; it is 1 to {limits.neighbours}")
    if n * request.k > limits.results:
        raise invalid(f"{n} queries for {request.k} neighbours; at most {limits.results} in all")
    if not request.exclude_keys:
        return None
    keys = rows(request.exclude_keys, "<i8", None, n, "exclude_keys").reshape(n, -1)
    if keys.shape[1] > limits.excluded:
        raise invalid(f"{keys.shape[1]} excluded keys a query; at most {limits.excluded}")
    return keys


def queries(request: pb.SearchRequest, version: pb.Version) -> np.ndarray | Sequence[str]:
    """The n queries as they were sent, none looked at yet: vectors float32 [n, E], chunks int32 [n, M], or texts.

    Raises:
      RefusedError: none, or of another embedder, tokenizer or width than the database's.
    """
    kind = request.WhichOneof("queries")
    if kind is None:
        raise invalid("no queries: vectors, tokens or texts")
    if kind == "texts":
        return request.texts.values
    if kind == "tokens":
        tokens = request.tokens
        if tokens.tokenizer and tokens.tokenizer != version.tokenizer:
            raise invalid("tokens of another tokenizer than the database's")
        if tokens.chunk_length != version.chunk_length:
            raise invalid(f"chunks of {tokens.chunk_length} tokens, this database's have {version.chunk_length}")
        return rows(tokens.values, "<i4", None, version.chunk_length, "tokens")
    vectors = request.vectors
    if vectors.dimension != version.dimension:
        raise invalid(f"vectors have {vectors.dimension} components, this database's {version.dimension}")
    if vectors.embedder and vectors.embedder != version.embedder:
        raise invalid("vectors of another embedder than the database's")
    return rows(vectors.values, "<f4", None, version.dimension, "vectors")


def check_vectors(values: np.ndarray) -> np.ndarray:
    """Queries float32 [n, E] that can be searched.

    Raises:
      RefusedError: a value that is not finite, or too large.
    """
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise invalid(f"query {int(np.flatnonzero(~finite)[0])} is not finite")
    # A square beyond float32 would make every distance infinite.
    if values.size and float(np.abs(values).max()) > math.sqrt(np.finfo(np.float32).max / (4 * values.shape[1])):
        raise invalid("a query is too large for distances in float32")
    return values


def check_tokens(chunks: np.ndarray, vocab_size: int) -> np.ndarray:
    """Chunks int32 [n, M] that can be decoded.

    Raises:
      RefusedError: a token outside the vocabulary.
    """
    if chunks.size and (chunks.min() < 0 or chunks.max() >= vocab_size):
        raise invalid(f"a token is outside the vocabulary of {vocab_size}")
    return chunks


def check_texts(texts: Sequence[str], limits: Limits) -> list[str]:
    """Texts that can be embedded.

    Raises:
      RefusedError: one is too long.
    """
    for i, text in enumerate(texts):
        if len(text.encode()) > limits.text_bytes:
            raise invalid(f"text {i} is longer than {limits.text_bytes} bytes")
    return list(texts)


def check_ids(request: pb.FetchRequest, version: pb.Version, limits: Limits) -> np.ndarray:
    """The chunk ids int64 [n] of a Fetch.

    Raises:
      RefusedError: too many, or outside the database.
    """
    ids = rows(request.ids, "<i8", None, 1, "ids")[:, 0]
    if len(ids) > limits.chunks:
        raise invalid(f"{len(ids)} chunks; a request has at most {limits.chunks}")
    if ids.size and (ids.min() < -1 or ids.max() >= version.chunks):
        raise invalid(f"chunk ids from {ids.min()} to {ids.max()}, the database has {version.chunks}")
    return ids


def check_answer_size(count: int, row_bytes: int, limits: Limits) -> None:
    """Refuses a request whose answer would not fit in a message."""
    if count * row_bytes + _OVERHEAD_BYTES > limits.message_bytes:
        raise invalid(f"an answer of {count} chunks would pass {limits.message_bytes} bytes; ask for fewer at a time")


def vectors_message(vectors: np.ndarray, embedder: str) -> pb.Vectors:
    values = np.ascontiguousarray(vectors, "<f4")
    return pb.Vectors(values=values.tobytes(), dimension=values.shape[1], embedder=embedder)


def keys_bytes(exclude_keys: np.ndarray | None, n: int) -> bytes:
    """Excluded keys int64 [n] or [n, X] as a request has them."""
    if exclude_keys is None:
        return b""
    return np.ascontiguousarray(np.asarray(exclude_keys).reshape(n, -1), "<i8").tobytes()


def found_message(found: Found, version: pb.Version, tokens: np.ndarray | None) -> pb.SearchResponse:
    return pb.SearchResponse(
        database=version.database,
        ids=np.ascontiguousarray(found.ids, "<i8").tobytes(),
        distances=np.ascontiguousarray(found.distances, "<f4").tobytes(),
        tokens=b"" if tokens is None else np.ascontiguousarray(tokens, "<i4").tobytes(),
        missing_shards=found.missing_shards,
        num_shards=version.num_shards,
        dropped=found.dropped,
    )


def read_found(response: pb.SearchResponse, n: int, k: int) -> Found:
    """The arrays of an answer to n queries for k neighbours."""
    ids = rows(response.ids, "<i8", n, k, "ids")
    distances = rows(response.distances, "<f4", n, k, "distances")
    return Found(ids, distances, response.dropped, tuple(response.missing_shards))


def merge(parts: list[Found], k: int) -> Found:
    """The k nearest of what disjoint sets of shards found, by (distance, id)."""
    if len(parts) == 1:
        return parts[0]
    ids, distances = merge_answers([(part.ids, part.distances) for part in parts], k)
    return Found(ids, distances, sum(part.dropped for part in parts))


def file_fingerprint(data: bytes) -> str:
    """The fingerprint by which a tokenizer's model file is known."""
    return hashlib.sha256(data).hexdigest()[:16]
