from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("using", "with_tokenizer", "with_routers")
    USING_FIELD_NUMBER: _ClassVar[int]
    WITH_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    WITH_ROUTERS_FIELD_NUMBER: _ClassVar[int]
    using: str
    with_tokenizer: bool
    with_routers: str
    def __init__(self, using: _Optional[str] = ..., with_tokenizer: bool = ..., with_routers: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("versions", "limits", "embeds", "draining", "tokenizer_model", "routers")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EMBEDS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[Version]
    limits: Limits
    embeds: bool
    draining: bool
    tokenizer_model: bytes
    routers: _containers.RepeatedCompositeFieldContainer[Router]
    def __init__(self, versions: _Optional[_Iterable[_Union[Version, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., embeds: bool = ..., draining: bool = ..., tokenizer_model: _Optional[bytes] = ..., routers: _Optional[_Iterable[_Union[Router, _Mapping]]] = ...) -> None: ...

class Router(_message.Message):
    __slots__ = ("num_shards", "centroids", "shard_of_cell", "cells_to_visit", "shard_sizes")
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    CENTROIDS_FIELD_NUMBER: _ClassVar[int]
    SHARD_OF_CELL_FIELD_NUMBER: _ClassVar[int]
    CELLS_TO_VISIT_FIELD_NUMBER: _ClassVar[int]
    SHARD_SIZES_FIELD_NUMBER: _ClassVar[int]
    num_shards: int
    centroids: bytes
    shard_of_cell: bytes
    cells_to_visit: int
    shard_sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_shards: _Optional[int] = ..., centroids: _Optional[bytes] = ..., shard_of_cell: _Optional[bytes] = ..., cells_to_visit: _Optional[int] = ..., shard_sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("database", "corpus", "embedder", "tokenizer", "dimension", "chunk_length", "chunks", "num_shards", "shards", "normalized", "max_length", "recall")
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    CORPUS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZED_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    database: str
    corpus: str
    embedder: str
    tokenizer: str
    dimension: int
    chunk_length: int
    chunks: int
    num_shards: int
    shards: _containers.RepeatedScalarFieldContainer[int]
    normalized: bool
    max_length: int
    recall: float
    def __init__(self, database: _Optional[str] = ..., corpus: _Optional[str] = ..., embedder: _Optional[str] = ..., tokenizer: _Optional[str] = ..., dimension: _Optional[int] = ..., chunk_length: _Optional[int] = ..., chunks: _Optional[int] = ..., num_shards: _Optional[int] = ..., shards: _Optional[_Iterable[int]] = ..., normalized: bool = ..., max_length: _Optional[int] = ..., recall: _Optional[float] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("queries", "neighbours", "excluded", "chunks", "text_bytes", "message_bytes", "seconds", "results")
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    queries: int
    neighbours: int
    excluded: int
    chunks: int
    text_bytes: int
    message_bytes: int
    seconds: float
    results: int
    def __init__(self, queries: _Optional[int] = ..., neighbours: _Optional[int] = ..., excluded: _Optional[int] = ..., chunks: _Optional[int] = ..., text_bytes: _Optional[int] = ..., message_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., results: _Optional[int] = ...) -> None: ...

class SearchRequest(_message.Message):
    __slots__ = ("vectors", "tokens", "texts", "k", "exclude_keys", "database", "allow_partial", "with_tokens")
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_KEYS_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    WITH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    vectors: Vectors
    tokens: Tokens
    texts: Texts
    k: int
    exclude_keys: bytes
    database: str
    allow_partial: bool
    with_tokens: bool
    def __init__(self, vectors: _Optional[_Union[Vectors, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., texts: _Optional[_Union[Texts, _Mapping]] = ..., k: _Optional[int] = ..., exclude_keys: _Optional[bytes] = ..., database: _Optional[str] = ..., allow_partial: bool = ..., with_tokens: bool = ...) -> None: ...

class Vectors(_message.Message):
    __slots__ = ("values", "dimension", "embedder")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    EMBEDDER_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    dimension: int
    embedder: str
    def __init__(self, values: _Optional[bytes] = ..., dimension: _Optional[int] = ..., embedder: _Optional[str] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("values", "chunk_length", "tokenizer")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LENGTH_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    values: bytes
    chunk_length: int
    tokenizer: str
    def __init__(self, values: _Optional[bytes] = ..., chunk_length: _Optional[int] = ..., tokenizer: _Optional[str] = ...) -> None: ...

class Texts(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("database", "ids", "distances", "tokens", "missing_shards", "num_shards", "dropped")
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DISTANCES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MISSING_SHARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    database: str
    ids: bytes
    distances: bytes
    tokens: bytes
    missing_shards: _containers.RepeatedScalarFieldContainer[int]
    num_shards: int
    dropped: int
    def __init__(self, database: _Optional[str] = ..., ids: _Optional[bytes] = ..., distances: _Optional[bytes] = ..., tokens: _Optional[bytes] = ..., missing_shards: _Optional[_Iterable[int]] = ..., num_shards: _Optional[int] = ..., dropped: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("ids", "database", "with_documents")
    IDS_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    WITH_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    ids: bytes
    database: str
    with_documents: bool
    def __init__(self, ids: _Optional[bytes] = ..., database: _Optional[str] = ..., with_documents: bool = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("database", "tokens", "documents")
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    database: str
    tokens: bytes
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    def __init__(self, database: _Optional[str] = ..., tokens: _Optional[bytes] = ..., documents: _Optional[_Iterable[_Union[Document, _Mapping]]] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("id", "title")
    ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    id: str
    title: str
    def __init__(self, id: _Optional[str] = ..., title: _Optional[str] = ...) -> None: ...
