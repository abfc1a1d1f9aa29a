"""Documents of the training set that are near-duplicates of validation or test documents (paper section 2.1).

A training document is removed when its 13-gram Jaccard similarity with any evaluation document is 0.8 or more. While
the evaluation documents' shingles fit in memory, an inverted table of them gives every similarity exactly; beyond,
MinHash-LSH names candidates, whose similarity is then computed exactly, so that nothing is removed below the threshold
and 0.2 % are missed at it. Documents with a title from a list can be removed as well: the paper takes WikiText's
articles out of Wikipedia.

The stage writes for each training file the list of what is to be removed and why; `build_corpus` leaves these out, so
that nothing else ever sees them. Units of work are the evaluation files, then the training files.
"""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter, save_array
from retro_jax.data.distribute import BeamOptions, Unit, WorkersError, distribute
from retro_jax.data.shingles import BANDS, ROWS, band_keys, jaccard, shingles
from retro_jax.data.sources import Source
from retro_jax.data.stage import Manifest, ShardWriter, Stage, fingerprint, shard_name
from retro_jax.data.text import Document, ReadCounts, common_root, file_fingerprints
from retro_jax.errors import UserError

MODES = ("auto", "exact", "minhash")
TABLE_LIMIT = 100_000_000
TOTALS = ("documents", "bytes", "near_duplicates", "near_duplicate_bytes", "titles", "title_bytes")
_TABLE = ("table-keys.npy", "table-owners.npy")
_KEYS_AT_ONCE = 2**20  # looked up, of one document
_HEADING = re.compile(r"\s*= ([^=].*?) =\s*")


def find_duplicates(
    inputs: Sequence[str | Path],
    evaluation: Sequence[str | Path],
    directory: str | Path,
    *,
    titles: str | Path | None = None,
    n: int = 13,
    threshold: float = 0.8,
    mode: str = "auto",
    table_limit: int = TABLE_LIMIT,
    skip_bad: bool = False,
    options: BeamOptions | None = None,
) -> Manifest:
    """Finds the documents to be removed; goes on where an earlier run stopped.

    Memory: one document in a worker; the exact table takes 12 bytes a shingle of the evaluation documents, mapped by
    all workers, and three times that here while it is sorted. MinHash takes 252 bytes an evaluation document instead.

    Args:
      inputs: training files.
      evaluation: validation and test files; may be none when there are titles.
      directory: what is written: `removed-*.jsonl`, a line for each document, with "row", "id", "reason" and what it
        is a duplicate of.
      titles: a file of titles, one a line, or a WikiText file, whose headings are taken. Titles are compared by their
        letters and digits.
      n: words of a shingle.
      threshold: least similarity that removes.
      mode: "exact", "minhash", or "auto": exact up to `table_limit` shingles.
      table_limit: distinct shingles of the evaluation documents, summed over them.
      skip_bad: leave out lines that cannot be read.
      options: where the files are worked off; default in this process.

    Raises:
      UserError: bad input, with file and line, or settings that cannot be.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if n < 1 or not 0 < threshold <= 1:
        raise UserError(f"n must be at least 1 and the threshold above 0 and at most 1; they are {n} and {threshold:g}")
    inputs, evaluation = [Path(path) for path in inputs], [Path(path) for path in evaluation]
    if not inputs or not (evaluation or titles):
        raise UserError("there is nothing to compare: give training files, and evaluation files or titles")
    options = options or BeamOptions()
    keys = [] if titles is None else sorted(read_titles(titles))
    checksums = {
        f"{kind}/{name}": value
        for kind, paths in (("inputs", inputs), ("evaluation", evaluation))
        if paths
        for name, value in file_fingerprints(paths).items()
    }
    removed = [shard_name("removed", i, len(inputs), ".jsonl") for i in range(len(inputs))]
    settings = {
        "n": n,
        "threshold": threshold,
        "mode": mode,
        "table_limit": table_limit,
        "bands": [BANDS, ROWS],
        "titles": fingerprint(keys),
        "skip_bad": skip_bad,
        "files": dict(zip(removed, list(checksums.values())[: len(inputs)], strict=True)),
    }
    with Stage(directory, "duplicates", settings=settings, inputs=checksums) as stage:
        if stage.complete:
            return stage.manifest
        if not all(map(stage.has, removed)):
            parts = _write_evaluation(stage, evaluation, n, skip_bad, options)
            resolved = _write_table(stage, parts, mode, table_limit)
            with stage.shard("titles.json") as (path, _):
                path.write_text(json.dumps(keys))
            units = []
            for source, shard in zip(_sources(inputs, skip_bad), removed, strict=True):
                arguments = {"source": source, "shard": shard, "parts": parts, "n": n, "threshold": threshold}
                units.append(Unit((shard,), {**arguments, "mode": resolved}, Path(source["path"]).stat().st_size))
            distribute(stage, units, write_removed, options, label="near-duplicates", unit="bytes")
        counts = {key: sum(stage.counts(shard)[key] for shard in removed) for key in TOTALS}
        counts["mode"] = stage.counts(removed[0])["mode"]
        stage.keep(removed)
        return stage.finish(counts)


def write_shingles(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Unit of work: the shingles, their numbers, the LSH keys and the names of one evaluation file's documents."""
    members_shard, sizes_shard, keys_shard, names_shard = arguments["shards"]
    with (  # left in the other order: members are finished first
        writer.shard(names_shard) as (names_path, _),
        writer.shard(keys_shard) as (keys_path, _),
        writer.shard(sizes_shard) as (sizes_path, _),
        writer.shard(members_shard) as (members_path, counts),
    ):
        with (
            ArrayWriter(members_path, np.dtype("<u8")) as members,
            ArrayWriter(sizes_path, np.dtype("<i8")) as sizes,
            ArrayWriter(keys_path, np.dtype("<u8"), (BANDS,)) as keys,
            open(names_path, "w", encoding="utf-8") as names,
        ):
            for _, document in _read(writer, arguments["source"]):
                found = shingles(document.text, arguments["n"])
                members.append(found)
                sizes.append(np.array([len(found)]))
                keys.append(band_keys(found)[None])
                names.write(json.dumps(document.id) + "\n")
        counts.update(documents=sizes.rows, shingles=members.rows)


def write_removed(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Unit of work: which documents of one training file are to be removed, and why."""
    exact, n, threshold = arguments["mode"] == "exact", arguments["n"], arguments["threshold"]
    table = (writer.directory / _TABLE[0]).stat()
    parts = tuple(map(tuple, arguments["parts"]))
    evaluation = _Evaluation.opened(str(writer.directory), parts, (table.st_ino, table.st_mtime_ns))
    titles = set(json.loads((writer.directory / "titles.json").read_text()))
    totals = dict.fromkeys(TOTALS, 0)
    with writer.shard(arguments["shard"]) as (path, counts):
        with open(path, "w", encoding="utf-8") as lines:
            for row, document in _read(writer, arguments["source"]):
                size = len(document.text.encode())
                totals["documents"] += 1
                totals["bytes"] += size
                record: dict[str, Any] = {"row": row, "id": document.id}
                if titles and title_key(document.metadata.get("title", "")) in titles:
                    record |= {"reason": "title", "title": document.metadata["title"]}
                    totals["titles"] += 1
                    totals["title_bytes"] += size
                else:
                    number, similarity = evaluation.nearest(shingles(document.text, n), exact)
                    if similarity < threshold:
                        continue
                    record |= {"reason": "near_duplicate", "of": evaluation.name(number)}
                    record["similarity"] = round(similarity, 4)
                    totals["near_duplicates"] += 1
                    totals["near_duplicate_bytes"] += size
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        counts.update(totals, mode=arguments["mode"])


def read_titles(path: str | Path) -> set[str]:
    """Keys of the titles in a file: WikiText's headings " = Title = " when it has any, else all its lines."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of titles") from None
    except ValueError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    headings = [found[1] for found in map(_HEADING.fullmatch, lines) if found]
    keys = {title_key(title) for title in headings or lines} - {""}
    if not keys:
        raise UserError(f"{path}: there is no title in it")
    return keys


def title_key(title: str) -> str:
    """The letters and digits of a title, without case: WikiText writes "Hi @-@ fi" for "Hi-fi"."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", title).casefold()))


class _Evaluation:
    """The evaluation documents' shingles and the table that leads to them, mapped from files."""

    def __init__(self, directory: str, parts: tuple[tuple[str, ...], ...]) -> None:
        self._directory = Path(directory)
        self._parts = parts
        self._members = [self._map(part[0]) for part in parts]
        sizes = [self._map(part[1]) for part in parts]
        self._sizes = np.concatenate([np.zeros(0, np.int64), *sizes])
        self._ends = [np.cumsum(part) for part in sizes]
        self._firsts = np.cumsum([0, *map(len, sizes)])  # number of each part's first document
        self._keys, self._owners = map(self._map, _TABLE)

    @staticmethod
    @functools.lru_cache(1)
    def opened(directory: str, parts: tuple[tuple[str, ...], ...], written: tuple[int, int]) -> "_Evaluation":
        """Opened once in a process for the table that was `written` so: a later run may use the directory again."""
        return _Evaluation(directory, parts)

    def nearest(self, found: np.ndarray, exact: bool) -> tuple[int, float]:
        """Number of the evaluation document most like a document with these shingles, and its Jaccard similarity.

        The first of several; similarity 0 when none shares a shingle or, with MinHash, a key.
        """
        keys = found if exact else band_keys(found)
        shared: Counter[int] = Counter()
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            owners, counts = np.unique(self._owners_of(keys[first : first + _KEYS_AT_ONCE]), return_counts=True)
            shared.update(dict(zip(owners.tolist(), counts.tolist(), strict=True)))
        if not shared:
            return -1, 0.0
        candidates = np.array(sorted(shared))
        common = np.array([shared[number] for number in candidates.tolist()])
        if not exact:
            common = np.array([len(np.intersect1d(found, self._of(i), assume_unique=True)) for i in candidates])
        similarities = jaccard(common, len(found), self._sizes[candidates])
        best = int(np.argmax(similarities))
        return int(candidates[best]), float(similarities[best])

    def name(self, number: int) -> str:
        part = int(np.searchsorted(self._firsts, number, side="right")) - 1
        with open(self._directory / self._parts[part][3], encoding="utf-8") as names:
            return next(json.loads(line) for i, line in enumerate(names) if i == number - self._firsts[part])

    def _owners_of(self, keys: np.ndarray) -> np.ndarray:
        left = np.searchsorted(self._keys, keys, side="left")
        inside = left < len(self._keys)
        left, keys = left[inside], keys[inside]
        at = left[self._keys[left] == keys]
        counts = np.searchsorted(self._keys, self._keys[at], side="right") - at
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._owners[np.repeat(at, counts) + within]

    def _of(self, number: int) -> np.ndarray:
        part = int(np.searchsorted(self._firsts, number, side="right")) - 1
        end = self._ends[part][number - self._firsts[part]]
        return self._members[part][end - self._sizes[number] : end]

    def _map(self, name: str) -> np.ndarray:
        return np.load(self._directory / name, mmap_mode="r")


def _write_evaluation(
    stage: Stage, evaluation: list[Path], n: int, skip_bad: bool, options: BeamOptions
) -> list[tuple[str, ...]]:
    """The shards of each evaluation file, once they are written."""
    kinds = (("shingles", ".npy"), ("sizes", ".npy"), ("keys", ".npy"), ("names", ".jsonl"))
    parts = [
        tuple(shard_name(f"evaluation-{kind}", i, len(evaluation), suffix) for kind, suffix in kinds)
        for i in range(len(evaluation))
    ]
    units = [
        Unit(part, {"source": source, "shards": part, "n": n}, Path(source["path"]).stat().st_size)
        for part, source in zip(parts, _sources(evaluation, skip_bad), strict=True)
    ]
    try:
        distribute(stage, units, write_shingles, options, label="evaluation documents", unit="bytes")
    except WorkersError:
        raise
    except UserError:
        stage.discard()  # a mended input must not find the traces of the bad one
        raise
    return parts


def _write_table(stage: Stage, parts: list[tuple[str, ...]], mode: str, limit: int) -> str:
    """Writes the sorted keys with the number of the document each is of; gives the mode that was chosen."""
    total = sum(stage.counts(part[0])["shingles"] for part in parts)
    exact = mode == "exact" or (mode == "auto" and total <= limit)
    if not all(map(stage.has, _TABLE)):
        keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
        number = 0
        for part in parts:
            sizes = np.load(stage.directory / part[1])
            keys.append(np.load(stage.directory / part[0 if exact else 2]).reshape(-1))
            each = sizes if exact else np.full(len(sizes), BANDS)
            owners.append(np.repeat(np.arange(number, number + len(sizes), dtype=np.int32), each))
            number += len(sizes)
        all_keys = np.concatenate(keys)
        order = np.argsort(all_keys, kind="stable")
        for name, column in zip(_TABLE, (all_keys, np.concatenate(owners)), strict=True):
            with stage.shard(name) as (path, _):
                save_array(path, column[order])
    return "exact" if exact else "minhash"


def _sources(paths: list[Path], skip_bad: bool) -> list[dict[str, Any]]:
    root = str(common_root(paths))
    return [{"path": str(path.absolute()), "root": root, "skip_bad": skip_bad} for path in paths]


def _read(writer: ShardWriter, source: dict[str, Any]) -> Iterator[tuple[int, Document]]:
    read = ReadCounts()
    shown = 0
    for row, document in Source(**source).documents(read):
        yield row, document
        writer.advance(read.position - shown)
        shown = read.position
