"""What a database consists of: its base, later additions, and the documents taken out of it.

    DB/corpus, DB/embeddings, DB/index          the base
    DB/additions/00001/{corpus,embeddings,index}
    DB/segments.json                            which additions count and what is removed; absent: the base alone
    DB/removed-00002.npy                        ranges of removed chunks, int64 [r, 2]: first, stop

Chunk ids of an addition go on after those before it. `segments.json` is replaced by atomic rename and has a version
that counts up, so a reader that finds a higher one opens the database again. `DatabaseCorpus` reads the chunks of all.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import save_array
from retro_jax.data.corpus import Corpus, DocumentRecord
from retro_jax.data.ranges import in_ranges, merge_ranges
from retro_jax.data.stage import fingerprint
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.files import atomic_write, file_sha256, write_json

SEGMENTS = "segments.json"
ADDITIONS = "additions"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Segments:
    """The parts of a database beside its base.

    Attributes:
      version: counts up with every change; 0 without any.
      additions: folders in additions/, in order.
      removed_file: name of the file with `removed`; None: nothing is removed.
      removed_sha256: of it.
      removed: int64 [r, 2], first and stop of the removed chunk ids, in order and not touching.
    """

    version: int = 0
    additions: tuple[str, ...] = ()
    removed_file: str | None = None
    removed_sha256: str | None = None
    removed: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64), compare=False)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Segments":
        """Reads what a database consists of now.

        Raises:
          UserError: a file of it is missing or damaged.
        """
        directory = Path(directory)
        segments = cls._parse(directory / SEGMENTS)
        while True:
            try:
                return segments._with_removed(directory)
            except (OSError, UserError):  # the file may have gone because later versions took this one's place
                now = cls._parse(directory / SEGMENTS)
                if now.version == segments.version:
                    raise
                segments = now

    @classmethod
    def _parse(cls, path: Path) -> "Segments":
        """What the file says, not yet with the ranges."""
        if not path.exists():
            return cls()
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format_version"] != _FORMAT:
                raise UserError(f"{path}: format version {value['format_version']}, this program reads {_FORMAT}")
            return cls(int(value["version"]), tuple(value["additions"]), value["removed_file"], value["removed_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: does not say what the database consists of ({error}); restore it") from None

    def _with_removed(self, directory: Path) -> "Segments":
        """The same with the ranges of the removed chunks."""
        if self.removed_file is None:
            return self
        file = directory / self.removed_file
        if not file.is_file():
            raise UserError(f"{file}: the list of removed documents is missing; restore it")
        if file_sha256(file) != self.removed_sha256:
            raise UserError(f"{file}: checksum differs from {SEGMENTS}; restore it")
        return dataclasses.replace(self, removed=np.load(file, allow_pickle=False))

    def save(self, directory: str | os.PathLike, *, additions: tuple[str, ...], removed: np.ndarray) -> "Segments":
        """Writes the next version; whoever reads sees this one or that one, never a mixture.

        Args:
          directory: of the database.
          additions: folders of it from now on.
          removed: int64 [r, 2] ranges removed from now on, in any order, also overlapping.
        """
        directory, version = Path(directory), self.version + 1
        removed = merge_ranges(removed)
        name = sha256 = None
        if len(removed):
            name = f"removed-{version:05d}.npy"
            with atomic_write(directory / name) as path:
                save_array(path, removed)
            sha256 = file_sha256(directory / name)
        value = {
            "format_version": _FORMAT,
            "version": version,
            "additions": list(additions),
            "removed_file": name,
            "removed_sha256": sha256,
        }
        write_json(directory / SEGMENTS, value)
        for file in directory.glob("removed-*.npy"):
            if file.name not in (name, self.removed_file):  # somebody may just have read the version before
                file.unlink(missing_ok=True)
        return Segments(version, tuple(additions), name, sha256, removed)


def signature(directory: str | os.PathLike) -> tuple[Any, ...]:
    """Something that changes when a directory, or a link to one, holds another version; cheap enough for every second.

    The first part is the directory itself, links resolved.
    """
    resolved = Path(directory).resolve()
    marks: list[Any] = [resolved]
    for name in ("corpus/manifest.json", "index/manifest.json", "segments.json"):
        with contextlib.suppress(OSError):
            status = (resolved / name).stat()
            marks.append((name, status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(marks)


class DatabaseCorpus:
    """The chunks of a database: those of its base and its additions, by one range of ids. Needs no search library.

    An id of -1 means "none" everywhere; any other outside is an IndexError. Removed chunks can be read, since what was
    made before their removal names them; `removed` tells.

    Attributes:
      directory: of the database.
      segments: what it consists of.
      parts: `Corpus` of the base and of every addition.
      offsets: int64 [parts + 1], id of the first chunk of each part.
      chunk_length, vocab_size, pad_id, tokenizer_fingerprint: of all of them.
      num_chunks, num_documents: totals, removed ones among them.
      fingerprint: of the base's corpus when there are no additions.
    """

    def __init__(self, directory: str | os.PathLike, *, verify: bool = False) -> None:
        """Opens the corpora.

        Args:
          directory: of the database.
          verify: read everything once and compare with the manifests' checksums.

        Raises:
          UserError: one is missing or damaged, or does not belong to the others.
        """
        self.directory = Path(directory)
        self.segments = Segments.load(directory)
        folders = [self.directory, *(self.directory / ADDITIONS / name for name in self.segments.additions)]
        self.parts = [Corpus(folder / "corpus", verify=verify) for folder in folders]
        base = self.parts[0]
        for part in self.parts[1:]:
            for name in ("tokenizer_fingerprint", "chunk_length"):
                if getattr(part, name) != getattr(base, name):
                    raise UserError(f"{part.directory} has another {name} than {base.directory}; add it again")
        self.offsets = np.cumsum([0, *(part.num_chunks for part in self.parts)])
        self.num_chunks = int(self.offsets[-1])
        self.num_documents = sum(part.num_documents for part in self.parts)
        self.chunk_length: int = base.chunk_length
        self.vocab_size: int = base.vocab_size
        self.pad_id: int = base.pad_id
        self.tokenizer_fingerprint: str = base.tokenizer_fingerprint
        fingerprints = [part.fingerprint for part in self.parts]
        self.fingerprint = fingerprints[0] if len(self.parts) == 1 else fingerprint(fingerprints)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer all parts were made with."""
        return self.parts[0].tokenizer

    def verify(self) -> None:
        """Compares the checksums of all corpora.

        Raises:
          UserError: naming the first file that differs.
        """
        for part in self.parts:
            part.verify()

    def removed(self, ids: np.ndarray | int) -> np.ndarray:
        """bool [...]: whether chunks are of a removed document."""
        return in_ranges(np.asarray(ids, np.int64), self.segments.removed)

    def removed_documents(self, corpus: Corpus) -> int:
        """How many documents of a corpus that is a part of the database were removed; 0 for any other."""
        for part, offset in zip(self.parts, self.offsets[:-1].tolist(), strict=True):
            if part.fingerprint == corpus.fingerprint:
                return sum(int(self.removed(firsts + offset).sum()) for firsts, _ in part.document_ranges())
        return 0

    def tokens(self, ids: np.ndarray | int) -> np.ndarray:
        """int32 [..., M]: as `Corpus.tokens`."""
        return self._gather(ids, Corpus.tokens, self.chunk_length, self.pad_id, np.int32)

    def neighbour_tokens(self, ids: np.ndarray | int) -> np.ndarray:
        """int32 [..., 2M]: the chunk and its continuation, PAD where missing."""
        return self._gather(ids, Corpus.neighbour_tokens, 2 * self.chunk_length, self.pad_id, np.int32)

    def document_keys(self, ids: np.ndarray | int) -> np.ndarray:
        """int64 [...]: key of the document's group, comparable between corpora; -1 for -1."""
        return self._gather(ids, Corpus.document_keys, None, -1, np.int64)

    def document_index(self, ids: np.ndarray | int) -> np.ndarray:
        """int64 [...]: number of the document in the whole database; -1 for -1."""
        firsts = np.cumsum([0, *(part.num_documents for part in self.parts)])
        ids = np.asarray(ids, np.int64)
        local = self._gather(ids, Corpus.document_index, None, -1, np.int64)
        return np.where(ids >= 0, local + firsts[self._part_of(ids)], -1)

    def document(self, index: int) -> DocumentRecord:
        """Name, group, metadata and size of a document; its first chunk counts in the whole database."""
        for part, first in zip(self.parts, self.offsets[:-1].tolist(), strict=True):
            if 0 <= index < part.num_documents:
                record = part.document(index)
                return dataclasses.replace(record, first_chunk=record.first_chunk + first)
            index -= part.num_documents
        raise IndexError(f"the database has {self.num_documents} documents")

    def text(self, chunk: int) -> str:
        """Text of one chunk; a character that its end cuts in two shows as U+FFFD."""
        return self.tokenizer.decode(self.tokens(chunk))

    def _part_of(self, ids: np.ndarray) -> np.ndarray:
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_chunks):
            raise IndexError(f"chunk ids from {ids.min()} to {ids.max()}, the database has {self.num_chunks}")
        return np.maximum(np.searchsorted(self.offsets, ids, side="right") - 1, 0)

    def _gather(
        self,
        ids: np.ndarray | int,
        read: Callable[[Corpus, np.ndarray], np.ndarray],
        width: int | None,
        missing: int,
        dtype: type,
    ) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if len(self.parts) == 1:
            return read(self.parts[0], ids)
        of = self._part_of(ids)
        result = np.full(ids.shape if width is None else (*ids.shape, width), missing, dtype)
        for number in np.unique(of[ids >= 0]):
            chosen = (of == number) & (ids >= 0)
            result[chosen] = read(self.parts[number], ids[chosen] - self.offsets[number])
        return result
