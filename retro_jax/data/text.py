"""Documents out of files, one at a time: JSON lines, plain or compressed, and plain text."""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from retro_jax.errors import UserError
from retro_jax.files import file_sha256
from retro_jax.progress import Progress

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
METADATA_KEYS = ("title", "source", "domain", "language", "license", "origin", "url")
TEXT_PIECE_BYTES = 16 * 2**20
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      id: its name, distinct within a corpus.
      text: what is tokenised; never empty.
      group: shared by documents that must not retrieve from each other; the id when the input names none, and a hash of
        the text when it names no id either: ids made from file names would be the same in unrelated corpora.
      metadata: those of METADATA_KEYS that the input gives.
      place: "file:line" where it was read, for messages.
    """

    id: str
    text: str
    group: str
    metadata: dict[str, str]
    place: str


@dataclasses.dataclass
class ReadCounts:
    """What a reader met; filled while it reads.

    Attributes:
      documents: documents given out.
      bad_lines: lines skipped because they could not be read (`skip_bad`).
      empty_documents: documents without any character but white space, dropped.
      excluded_documents: those of `documents` that a `Source` did not hand on.
      position: bytes of the input files (compressed ones as they lie on disk) behind the reader.
    """

    documents: int = 0
    bad_lines: int = 0
    empty_documents: int = 0
    excluded_documents: int = 0
    position: int = 0


class _BadLineError(Exception):
    """A line or file that cannot be read; the message says why."""


def expand_inputs(patterns: str | Sequence[str]) -> list[Path]:
    """Files named by paths and glob patterns, several of them separated by commas; in order, each once.

    Raises:
      UserError: a pattern that matches no file, a directory, or a file of another kind.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    paths: dict[Path, None] = {}
    for pattern in (part.strip() for entry in patterns for part in str(entry).split(",")):
        if not pattern:
            continue
        # A name that exists is taken as it is, also when it has a bracket in it.
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"{pattern}: no such file")
        for path in map(Path, found):
            _check_kind(path)
            paths[path] = None
    if not paths:
        raise UserError("no input files are given; name at least one .jsonl, .jsonl.gz, .jsonl.zst or .txt file")
    return list(paths)


def read_documents(
    paths: Iterable[str | Path],
    *,
    skip_bad: bool = False,
    counts: ReadCounts | None = None,
    root: Path | None = None,
    piece_bytes: int = TEXT_PIECE_BYTES,
) -> Iterator[Document]:
    """Gives the documents of the files, in order, holding one at a time.

    A JSON line is an object with "text"; "id" (else "<file>:<line>"), "group" (else the id, else a hash of the text)
    and the METADATA_KEYS are optional. A .txt file is one document; one larger than `piece_bytes` is given as several,
    cut at line ends, that share their group. A byte order mark at the start of a file is dropped; nothing else of the
    text changes.

    Args:
      paths: files with one of the SUFFIXES.
      skip_bad: count and leave out lines that cannot be read instead of stopping.
      counts: filled while reading.
      root: directory that file names in ids are relative to; default the deepest one that holds all the files.
      piece_bytes: size of the pieces of a large .txt file.

    Raises:
      UserError: naming file and line: not UTF-8, not JSON, no "text", a lone surrogate; a damaged compressed file.
    """
    paths = [Path(path) for path in paths]
    root = common_root(paths) if root is None else root
    counts = ReadCounts() if counts is None else counts
    finished = 0
    for path in paths:
        _check_kind(path)
        name = os.path.relpath(path, root).replace(os.sep, "/")
        with open(path, "rb") as raw:
            if path.name.endswith(".txt"):
                documents = _read_text(raw, path, name, skip_bad, counts, piece_bytes)
            else:
                documents = _read_json_lines(raw, path, name, skip_bad, counts)
            for document in documents:
                counts.position = finished + raw.tell()
                if not document.text.strip():
                    counts.empty_documents += 1
                    continue
                counts.documents += 1
                yield document
            finished += raw.seek(0, os.SEEK_END)
            counts.position = finished


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Gives the lines of a file, plain, .gz or .zst, with their numbers from 1, without a byte order mark.

    Raises:
      UserError: no such file, or a damaged compressed one.
    """
    path, number = Path(path), 0
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as raw:
        try:
            for number, line in enumerate(_lines(_decompressed(raw, path)), start=1):
                yield number, line.removeprefix(_BOM) if number == 1 else line
        except _BadLineError as error:
            raise UserError(f"{path}:{number + 1}: {error}") from None


def common_root(paths: Sequence[Path]) -> Path:
    """The deepest directory that holds all the files."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths])) if paths else Path(".")


def file_fingerprints(paths: Sequence[Path]) -> dict[str, str]:
    """Says what each file holds: 16 hex digits of its SHA-256, by its name relative to their common root.

    Raises:
      UserError: a file is there twice.
    """
    root = common_root(paths)
    names = [os.path.relpath(path, root) for path in paths]
    if len(set(names)) < len(names):
        raise UserError("an input file is named twice")
    sizes = [path.stat().st_size for path in paths]
    found = {}
    with Progress("checksums", total=sum(sizes), unit="bytes") as progress:
        for name, path, size in zip(names, paths, sizes, strict=True):
            found[name] = file_sha256(path)[:16]
            progress.update(size)
    return found


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a directory; name its files, for example '{path}/*.jsonl'")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")


def _read_json_lines(raw: BinaryIO, path: Path, name: str, skip_bad: bool, counts: ReadCounts) -> Iterator[Document]:
    lines = _lines(_decompressed(raw, path))
    number = 0
    while True:
        number += 1
        try:
            line = next(lines, None)
            if line is None:
                return
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _parse_line(line, name, number, f"{path}:{number}")
        except _BadLineError as error:
            if not skip_bad:
                raise UserError(f"{path}:{number}: {error}") from None
            counts.bad_lines += 1


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    try:
        yield from stream
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise _BadLineError(f"the compressed file is damaged from here on ({error})") from None


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstandardFile(raw), 2**20)
    return raw


class _ZstandardFile(io.RawIOBase):
    """Frames of Zstandard, one after another; a file that ends inside a frame is an error, not a short file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(2**17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _parse_line(line: bytes, name: str, number: int, place: str) -> Document:
    try:
        record = json.loads(_decode(line))
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _BadLineError("not a JSON object")
    if not isinstance(record.get("text"), str):
        raise _BadLineError('has no "text"' if "text" not in record else '"text" is not a string')
    own = _name_of(record, "group") or _name_of(record, "id")
    identity = _name_of(record, "id") or f"{name}:{number}"
    metadata = {key: record[key] for key in METADATA_KEYS if isinstance(record.get(key), str)}
    document = Document(identity, record["text"], own or _content_group(record["text"]), metadata, place)
    for what, value in (("text", document.text), ("id", identity), ("group", document.group), *metadata.items()):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _BadLineError(f'"{what}" holds a lone surrogate, which is no character') from None
    return document


def _content_group(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _name_of(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadLineError(f'"{key}" is neither a string nor a whole number')
    return str(value)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLineError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from None


def _read_text(
    raw: BinaryIO, path: Path, name: str, skip_bad: bool, counts: ReadCounts, piece_bytes: int
) -> Iterator[Document]:
    line = 1
    pieces = 0
    group = ""
    rest = raw.read(piece_bytes).removeprefix(_BOM)
    while rest or pieces == 0:
        ahead = raw.read(piece_bytes)
        cut = _cut(rest) if ahead else len(rest)
        text = _decode_lines(rest[:cut], path, line, skip_bad, counts)
        identity = name if pieces == 0 and not ahead else f"{name}#{pieces}"
        group = _content_group(text) if pieces == 0 else group
        yield Document(identity, text, group, {}, f"{path}:{line}")
        line += rest.count(b"\n", 0, cut)
        pieces += 1
        rest = rest[cut:] + ahead


def _cut(data: bytes) -> int:
    """Where to end a piece: behind its last line end, else behind its last whole character."""
    newline = data.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:  # the first byte of the last character
            return len(data) - back or len(data)
    return len(data)


def _decode_lines(data: bytes, path: Path, first_line: int, skip_bad: bool, counts: ReadCounts) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        kept = []
        for number, line in enumerate(io.BytesIO(data), first_line):
            try:
                kept.append(_decode(line))
            except _BadLineError as error:
                if not skip_bad:
                    raise UserError(f"{path}:{number}: {error}") from None
                counts.bad_lines += 1
        return "".join(kept)
