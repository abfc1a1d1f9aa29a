"""The retrieval database: its chunks, its indexes, and for live queries its embedder (paper section 2.3)."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_jax.data.stage import fingerprint
from retro_jax.errors import UserError
from retro_jax.retrieval.excluding import search_excluding
from retro_jax.retrieval.index import Index, merge
from retro_jax.retrieval.segments import ADDITIONS, DatabaseCorpus

if TYPE_CHECKING:  # the embedder brings JAX, and a server that only searches needs none
    from retro_jax.retrieval.embedder import Embedder


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """What was retrieved for n chunks; place j is the j-th nearest.

    Attributes:
      ids: [n, K] int64 database chunks, -1 for none.
      distances: [n, K] float32 squared L2, +inf for none.
      tokens: [n, K, R] int32, the chunk and its continuation; PAD for none and where a document ends.
    """

    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


class Database:
    """A directory with corpus/ and index/ in it, and additions, opened by `Database.open`.

    It stays as it was opened; `retrieval/live.py: LiveDatabase` follows what is added and removed.

    Attributes:
      corpus: `DatabaseCorpus`, the chunks of all its parts.
      indexes: `Index` of the base and of each addition.
      embedder: for `retrieve`; None when only vectors are searched.
      dimension: E.
      embedder_fingerprint: of the embedder that made the vectors.
      num_index_shards: of all indexes; numbered through, those of the base first.
      index_shards: numbers of the shards that are loaded.
      size: vectors in the loaded shards.
      fingerprint: 16 hex digits of all its parts, whichever are loaded; what was retrieved records it.
    """

    def __init__(self, corpus: DatabaseCorpus, indexes: Sequence[Index], embedder: "Embedder | None" = None) -> None:
        """Joins the parts.

        Raises:
          UserError: an index was made from another corpus, or with another embedder.
        """
        for part, index in zip(corpus.parts, indexes, strict=True):
            if index.corpus_fingerprint != part.fingerprint:
                raise UserError(
                    f"the index was made from corpus {index.corpus_fingerprint}, {part.directory} is corpus "
                    f"{part.fingerprint}; embed and index this corpus"
                )
            require_embedder(index.embedder_fingerprint, indexes[0].embedder_fingerprint, str(index.directory))
        if embedder is not None:
            require_embedder(embedder.fingerprint, indexes[0].embedder_fingerprint, "the given embedder")
        self.corpus = corpus
        self.indexes = tuple(indexes)
        self.embedder = embedder
        self.dimension = indexes[0].dimension
        self.embedder_fingerprint = indexes[0].embedder_fingerprint
        firsts = np.cumsum([0, *(index.num_shards for index in indexes)]).tolist()
        self.num_index_shards = firsts[-1]
        self.index_shards = tuple(
            first + number for first, index in zip(firsts[:-1], indexes, strict=True) for number in index.shards
        )
        self.size = sum(index.size for index in indexes)
        parts = [
            {"corpus": part.fingerprint, "index": index.fingerprint}
            for part, index in zip(corpus.parts, indexes, strict=True)
        ]
        changes = {"additions": parts[1:], "removed": corpus.segments.removed_sha256}
        self.fingerprint = fingerprint(parts[0] if not any(changes.values()) else parts[0] | changes)

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike,
        embedder: "Embedder | None" = None,
        *,
        index_shards: Sequence[int] | None = None,
        verify: bool = True,
    ) -> "Database":
        """Opens a database directory.

        Args:
          directory: has corpus/ and index/ in it.
          embedder: to embed live queries; must be the one the database was made with.
          index_shards: numbers of the shards to load, through all parts; None: all.
          verify: compare the checksums of the chunks and of the index shards first, which reads all of them.

        Raises:
          UserError: a part missing, unfinished or damaged; parts that do not belong together; no such shard.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a database with corpus/ and index/ in it")
        corpus = DatabaseCorpus(directory, verify=verify)
        folders = [directory, *(directory / ADDITIONS / name for name in corpus.segments.additions)]
        indexes: list[Index] = []
        first = 0
        for folder in folders:
            count = Index.count_shards(folder / "index")
            mine = None
            if index_shards is not None:
                mine = [number - first for number in index_shards if first <= number < first + count]
            indexes.append(Index.load(folder / "index", shards=mine, verify=verify))
            first += count
        if index_shards is not None and (wrong := [number for number in index_shards if not 0 <= number < first]):
            raise UserError(f"{directory} has index shards 0 to {first - 1}, not {wrong[0]}")
        return cls(corpus, indexes, embedder)

    def search(
        self, vectors: np.ndarray, k: int, exclude_keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest chunks of vectors [n, E]: ids int64 [n, K] (-1) and squared distances float32 [n, K] (+inf).

        Nearest first, equally near ones by id. Chunks of removed documents are never among them.

        Args:
          vectors: query vectors; a zero vector is a chunk without word pieces and finds nothing.
          k: neighbours.
          exclude_keys: int64 [n] or [n, X], document keys whose chunks are no neighbours of that row; -1 for none.
        """
        return self.search_found(vectors, k, exclude_keys)[:2]

    def search_found(
        self, vectors: np.ndarray, k: int, exclude_keys: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The same, and how many nearer hits of excluded documents were dropped altogether."""
        vectors = self.indexes[0].checked(vectors, k)
        removed = self.corpus.removed if len(self.corpus.segments.removed) else None
        return search_excluding(
            self.search_indexes, self.size, self.document_keys, vectors, k, exclude_keys, removed=removed
        )

    def search_indexes(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of all loaded shards, removed chunks among them; see `Index.search`."""
        found = []
        for index, offset in zip(self.indexes, self.corpus.offsets[:-1], strict=True):
            ids, squares = index.search(vectors, k)
            found.append((np.where(ids >= 0, ids + offset, -1), squares))
        return found[0] if len(found) == 1 else merge(found, k)

    def retrieve(self, chunk_tokens: np.ndarray, k: int, exclude_keys: np.ndarray | None = None) -> Neighbours:
        """Embeds chunks [n, M] of tokens of this database's tokenizer and gives their K neighbours by value.

        Raises:
          UserError: the database was opened without an embedder.
        """
        if self.embedder is None:
            raise UserError("live queries need the embedder: open the database with the one it was made with")
        batch = self.embedder.embed_chunks(chunk_tokens, self.corpus.tokenizer)
        ids, distances = self.search(batch.vectors, k, exclude_keys)
        return Neighbours(ids, distances, self.neighbour_tokens(ids))

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [..., R]: chunks [...] and their continuations; PAD for -1 and where a document ends."""
        return self.corpus.neighbour_tokens(ids)

    def document_keys(self, ids: np.ndarray) -> np.ndarray:
        """int64 [...]: keys of the chunks' documents, comparable between corpora; -1 for -1."""
        return self.corpus.document_keys(ids)

    def texts(self, ids: np.ndarray) -> list[str]:
        """Texts of chunk ids [n]; empty for -1."""
        return ["" if chunk < 0 else self.corpus.text(chunk) for chunk in np.asarray(ids).reshape(-1).tolist()]

    def documents(self, ids: np.ndarray) -> list[tuple[str, str]]:
        """(id, title) of the document of each chunk id [n]; empty strings for -1 and for no title."""
        corpus = self.corpus
        records = [corpus.document(index) if index >= 0 else None for index in corpus.document_index(ids).tolist()]
        return [("", "") if record is None else (record.id, record.metadata.get("title", "")) for record in records]

    def describe(self) -> dict[str, Any]:
        """What it is, JSON-serialisable: fingerprints, sizes, shards, the embedder's settings, measured recall."""
        corpus, base = self.corpus, self.indexes[0].manifest
        removed = corpus.segments.removed
        return {
            "fingerprint": self.fingerprint,
            "version": corpus.segments.version,
            "corpus": corpus.fingerprint,
            "tokenizer": corpus.tokenizer_fingerprint,
            "vocab_size": corpus.vocab_size,
            "chunk_length": corpus.chunk_length,
            "chunks": corpus.num_chunks,
            "documents": corpus.num_documents,
            "removed_chunks": int((removed[:, 1] - removed[:, 0]).sum()),
            "additions": len(corpus.segments.additions),
            "embedder": self.embedder_fingerprint,
            "embedder_settings": base.settings["embedder"],
            "dimension": self.dimension,
            "metric": base.settings["metric"],
            "index_shards": self.num_index_shards,
            "loaded_index_shards": list(self.index_shards),
            "vectors": sum(index.manifest.counts["vectors"] for index in self.indexes),
            "recall_at_2": min(index.manifest.counts["recall_at_2"] for index in self.indexes),
        }


def require_embedder(given: str, recorded: str, what: str) -> None:
    """Refuses vectors of another embedder than the one the database records.

    Raises:
      UserError: naming both fingerprints.
    """
    if given != recorded:
        raise UserError(
            f"{what} is {given}, the database was embedded with {recorded}: use the same checkpoint, normalize and "
            "max_length"
        )
