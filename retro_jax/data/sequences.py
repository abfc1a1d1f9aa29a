"""The sequences stage: corpus chunks and their neighbours to training sequences in TFRecords, and their reader."""

import dataclasses
import functools
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from retro_jax.data.arrays import ArrayWriter, save_array
from retro_jax.data.corpus import TOKENIZER_FILE, Corpus
from retro_jax.data.distribute import BeamOptions, Unit, distribute
from retro_jax.data.ranges import in_ranges
from retro_jax.data.records import SequenceSchema
from retro_jax.data.stage import Manifest, ShardWriter, Stage, fingerprint, load_manifest, shard_name
from retro_jax.data.tfrecord import FRAME_BYTES, FixedStrideReader, RecordWriter
from retro_jax.errors import UserError

PACKINGS = ("document", "packed")
_SPANS = "spans.npy"
_REMOVED = "removed.npy"
_SPANS_AT_ONCE = 1_000_000
_TOTALS = ("sequences", "chunks", "tokens", "bytes")
_BLOCK = 64
_OPEN_SHARDS = 128
_READ_DTYPES = {"u": np.dtype(np.int32), "i": np.dtype(np.int64), "f": np.dtype(np.float32)}


class NeighbourText(Protocol):
    """What is needed of the chunks that neighbours are, a `Corpus` for example; opened again like the neighbours."""

    directory: Path
    fingerprint: str
    tokenizer_fingerprint: str
    chunk_length: int

    def document_keys(self, ids: np.ndarray) -> np.ndarray:
        """int64 [...]: key of the group of each chunk's document, -1 for -1."""

    def neighbour_tokens(self, ids: np.ndarray) -> np.ndarray:
        """int32 [..., R]: chunk and continuation, PAD where missing."""

    def verify(self) -> None:
        """Compares all checksums."""


class NeighbourTable(Protocol):
    """What is needed of precomputed neighbours, keyed by chunk of the query corpus.

    A worker opens them again, with their class and their directory.
    """

    directory: Path
    k: int
    fingerprint: str
    corpus_fingerprint: str
    database_fingerprint: str
    database_corpus_fingerprint: str

    def ids(self, chunk_ids: np.ndarray) -> np.ndarray:
        """int64 [n, k]: chunk ids in the database in order of rank, -1 for none."""

    def distances(self, chunk_ids: np.ndarray) -> np.ndarray:
        """float32 [n, k]: squared distances, inf for none."""

    def verify(self) -> None:
        """Compares all checksums."""


def write_sequences(
    corpus: Corpus,
    neighbours: NeighbourTable,
    database_corpus: NeighbourText,
    directory: str | Path,
    *,
    length: int,
    k: int,
    packing: str = "document",
    shard_records: int = 8192,
    seed: int = 0,
    removed: np.ndarray | None = None,
    options: BeamOptions | None = None,
) -> Manifest:
    """Cuts a corpus into sequences of T tokens with the neighbours of every chunk by value, in random order.

    A chunk gets its first k neighbours in order of rank that share no document group with any document of the
    sequence (paper section 2.3) and were not removed since; chunks with fewer are counted by `chunks_by_neighbours` in
    the manifest. What is read is mapped, not loaded, and the order is computed place by place, so memory does not grow
    with the corpus.

    Args:
      corpus: what is trained on.
      neighbours: its neighbours, more than k of them to have k left.
      database_corpus: the corpus whose chunks the neighbours are.
      directory: what is written.
      length: T, a multiple of the chunk length.
      k: K.
      packing: "document": a sequence holds one document, its tail is padded. "packed": it holds consecutive chunks
        whatever their document, so only last chunks of documents have padding.
      shard_records: sequences of a shard.
      seed: of the order, 0 to 2^32 - 1.
      removed: int64 [r, 2], first and stop of chunk ids of the database that are neighbours no more, since their
        documents were removed after these were found (`Segments.removed`); None: nothing was.
      options: where the shards are written; default in this process.

    Raises:
      UserError: inputs that do not belong together or are damaged, or settings that cannot be.
    """
    _check_inputs(corpus, neighbours, database_corpus, k, packing, shard_records)
    M = corpus.chunk_length
    schema = SequenceSchema(length, M, k, 2 * M, corpus.vocab_size)
    settings = {
        "schema": dataclasses.asdict(schema),
        "packing": packing,
        "shard_records": shard_records,
        "seed": seed,
    }
    inputs = {
        "tokenizer": corpus.tokenizer_fingerprint,
        "corpus": corpus.fingerprint,
        "neighbours": neighbours.fingerprint,
        "database": neighbours.database_fingerprint,
    }
    removed = np.zeros((0, 2), np.int64) if removed is None else removed
    if len(removed):
        inputs["removed"] = fingerprint(removed.tolist())
    with Stage(directory, "sequences", settings=settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        for opened in (corpus, neighbours, database_corpus):  # here, as every shard is of chunks from all over them
            opened.verify()
        if not stage.has(_REMOVED):
            with stage.shard(_REMOVED) as (path, _):
                save_array(path, removed)
        if not stage.has(_SPANS):
            with stage.shard(_SPANS) as (path, counts):
                with ArrayWriter(path, np.dtype("<i8"), (2,)) as writer:
                    for spans in _spans(corpus, schema.chunks, packing):
                        writer.append(spans)
                counts["sequences"] = writer.rows
        total = stage.counts(_SPANS)["sequences"]
        shards = -(-total // shard_records)
        names = [shard_name("sequences", i, shards, ".tfrecord") for i in range(shards)]
        units = []
        for i, name in enumerate(names):
            first, end = i * shard_records, min((i + 1) * shard_records, total)
            arguments = {
                "shard": name,
                "places": [first, end],
                "seed": seed,
                "packing": packing,
                "schema": dataclasses.asdict(schema),
                "opened": [_reference(entry) for entry in (corpus, neighbours, database_corpus)],
            }
            units.append(Unit((name,), arguments, end - first))
        distribute(stage, units, write_shard, options or BeamOptions(), label="sequences", unit="sequences")
        stage.keep(names)
        counts = {key: sum(stage.counts(name)[key] for name in names) for key in _TOTALS}
        counts["padding_tokens"] = counts["sequences"] * length - counts["tokens"]
        counts["chunks_by_neighbours"] = np.sum([stage.counts(n)["chunks_by_neighbours"] for n in names], 0).tolist()
        with stage.shard(TOKENIZER_FILE) as (path, _):
            shutil.copyfile(corpus.directory / TOKENIZER_FILE, path)
        return stage.finish(counts)


def write_shard(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Unit of work: the sequences at some places of the shuffled order, into the shard `arguments["shard"]`."""
    corpus, neighbours, database = (_open(*reference) for reference in arguments["opened"])
    schema = SequenceSchema(**arguments["schema"])
    spans = np.load(writer.directory / _SPANS, mmap_mode="r")
    removed = np.load(writer.directory / _REMOVED)
    order = grain.MapDataset.range(len(spans)).shuffle(seed=arguments["seed"])
    chosen = np.array([order[place] for place in range(*arguments["places"])])
    totals = dict.fromkeys(_TOTALS, 0)
    histogram = np.zeros(schema.neighbours + 1, np.int64)
    with writer.shard(arguments["shard"]) as (path, counts):
        with RecordWriter(path) as records:
            for first in range(0, len(chosen), _BLOCK):
                starts, ends = spans[chosen[first : first + _BLOCK]].T
                ids = _chunk_ids(starts, ends, schema.chunks)
                examples = _examples(ids, corpus, neighbours, database, removed, schema, arguments["packing"])
                for row in range(len(ids)):
                    records.write(schema.encode({key: value[row] for key, value in examples.items()}))
                _count(ids, examples, corpus, totals, histogram)
                writer.advance(len(ids))
        counts.update(totals, chunks_by_neighbours=histogram.tolist())


class SequenceSource:
    """Random access to the sequences of a directory; a data source for Grain. May be shared by threads.

    Attributes:
      directory, manifest, fingerprint: of the stage.
      schema: shapes of a sequence.
      tokenizer_fingerprint: of the tokenizer whose ids these are.
      tokenizer_path: its file, kept beside the sequences.
      prompt_length: tokens at the beginning of every sequence that are given and not predicted (`answer_rows`).
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        """Opens the data set.

        Args:
          directory: output of the sequences stage.
          verify: check the checksum of every record that is read.

        Raises:
          UserError: no complete data set here, or a shard missing or cut short.
        """
        self.directory = Path(directory)
        self.manifest = load_manifest(directory, "sequences")
        self.fingerprint = self.manifest.fingerprint
        self.schema = SequenceSchema(**self.manifest.settings["schema"])
        self.tokenizer_fingerprint: str = self.manifest.inputs["tokenizer"]
        self.tokenizer_path = self.directory / TOKENIZER_FILE
        self.prompt_length: int = self.manifest.settings.get("prompt_length", 0)
        self._verify = verify
        shards = [shard for shard in self.manifest.shards if shard.name.endswith(".tfrecord")]
        stride = self.schema.payload_bytes + FRAME_BYTES
        for shard in shards:
            if shard.size % stride:
                raise UserError(f"{self.directory / shard.name}: not a whole number of records; rebuild it")
        self._paths = [self.directory / shard.name for shard in shards]
        self._offsets = np.concatenate([[0], np.cumsum([shard.size // stride for shard in shards])]).astype(np.int64)
        # A data set may have more shards than a process may have open files.
        self._reader = functools.lru_cache(_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of sequence `index` by feature name (see `SequenceSchema.features`).

        Tokens and bytes are int32, ids and keys int64, distances float32.

        Raises:
          UserError: naming file and record, when it is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.directory}")
        shard = int(np.searchsorted(self._offsets, index, side="right")) - 1
        record = int(index - self._offsets[shard])
        payload = self._reader(shard).read(record, verify=self._verify)
        try:
            example = self.schema.decode(payload)
        except UserError as error:
            raise UserError(f"{self._paths[shard]}: record {record}: {error}; rebuild it") from None
        return {name: array.astype(_READ_DTYPES[array.dtype.kind]) for name, array in example.items()}

    def __repr__(self) -> str:
        return f"SequenceSource({str(self.directory)!r}, {len(self)} sequences, {self.fingerprint})"

    def _open(self, shard: int) -> FixedStrideReader:
        return FixedStrideReader(self._paths[shard], self.schema.payload_bytes)


def _check_inputs(
    corpus: Corpus, neighbours: NeighbourTable, database: NeighbourText, k: int, packing: str, shard_records: int
) -> None:
    if packing not in PACKINGS:
        raise UserError(f"packing {packing!r} is none of {', '.join(PACKINGS)}")
    if shard_records < 1:
        raise UserError(f"shard_records must be at least 1, is {shard_records}")
    if not 1 <= k <= neighbours.k:
        raise UserError(f"k is {k}; the neighbours hold from 1 to {neighbours.k} a chunk")
    if neighbours.corpus_fingerprint != corpus.fingerprint:
        raise UserError(f"the neighbours are those of another corpus than {corpus.directory}; find them for this one")
    if neighbours.database_corpus_fingerprint != database.fingerprint:
        raise UserError(f"the neighbours were found in another database than {database.directory}; give that one")
    if database.tokenizer_fingerprint != corpus.tokenizer_fingerprint:
        raise UserError(f"{database.directory} was made with another tokenizer than {corpus.directory}")
    if database.chunk_length != corpus.chunk_length:
        raise UserError(
            f"{database.directory} has chunks of {database.chunk_length} tokens, {corpus.directory} has chunks of "
            f"{corpus.chunk_length}"
        )


def _reference(opened: Any) -> tuple[str, str, str, str]:
    """How a worker opens the same thing: module and name of its class, directory, fingerprint."""
    kind = type(opened)
    return kind.__module__, kind.__qualname__, str(Path(opened.directory).absolute()), opened.fingerprint


@functools.lru_cache(3)
def _open(module: str, name: str, directory: str, fingerprint: str) -> Any:
    opened = getattr(importlib.import_module(module), name)(directory)
    if opened.fingerprint != fingerprint:
        raise UserError(f"{directory} has changed since the sequences were begun; write them to another directory")
    return opened


def _spans(corpus: Corpus, chunks: int, packing: str) -> Iterator[np.ndarray]:
    """First chunk and end of every sequence, blocks of int64 [n, 2] in corpus order."""
    if packing == "packed":
        for first in range(0, corpus.num_chunks, chunks * _SPANS_AT_ONCE):
            starts = np.arange(first, min(first + chunks * _SPANS_AT_ONCE, corpus.num_chunks), chunks)
            yield np.stack([starts, np.minimum(starts + chunks, corpus.num_chunks)], axis=1)
        return
    for firsts, counts in corpus.document_ranges():
        sequences = -(-counts // chunks)
        within = np.arange(sequences.sum()) - np.repeat(np.cumsum(sequences) - sequences, sequences)
        starts = np.repeat(firsts, sequences) + within * chunks
        yield np.stack([starts, np.minimum(starts + chunks, np.repeat(firsts + counts, sequences))], axis=1)


def _chunk_ids(starts: np.ndarray, ends: np.ndarray, chunks: int) -> np.ndarray:
    """int64 [n, L]: the chunks of each sequence, -1 behind its end."""
    ids = starts[:, None] + np.arange(chunks)
    return np.where(ids < ends[:, None], ids, -1)


def _examples(
    ids: np.ndarray,
    corpus: Corpus,
    table: NeighbourTable,
    database: NeighbourText,
    removed: np.ndarray,
    schema: SequenceSchema,
    packing: str,
) -> dict[str, np.ndarray]:
    """All features of the sequences with chunk ids [n, L], stacked on the first axis."""
    keys = corpus.document_keys(ids)
    neighbour_ids, distances = _filtered(ids, keys, table, database, removed, schema.neighbours)
    return {
        "bytes": corpus.byte_counts(ids),
        "chunks": ids,
        "distances": distances,
        "document_keys": keys,
        "documents": corpus.document_index(ids),
        "neighbour_ids": neighbour_ids,
        "neighbours": database.neighbour_tokens(neighbour_ids),
        "tokens": np.concatenate(
            [corpus.tokens(ids).reshape(len(ids), schema.length), _last_labels(ids, corpus, packing)[:, None]], axis=1
        ),
    }


def _last_labels(ids: np.ndarray, corpus: Corpus, packing: str) -> np.ndarray:
    """int32 [n]: the token behind each sequence: first of the next chunk, PAD where there is none."""
    last = ids[:, -1]
    if packing == "document":
        following = corpus.continuation(last)
    else:
        following = np.where((last >= 0) & (last + 1 < corpus.num_chunks), last + 1, -1)
    return corpus.tokens(following)[:, 0]


def _filtered(
    ids: np.ndarray, keys: np.ndarray, table: NeighbourTable, database: NeighbourText, removed: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """First k neighbours of each chunk [n, L] that share no key with the sequence and were not removed.

    Returns:
      ids and distances [n, L, K].
    """
    n, L = ids.shape
    found = np.full((n, L, table.k), -1, np.int64)
    distances = np.full((n, L, table.k), np.inf, np.float32)
    real = ids >= 0
    found[real] = table.ids(ids[real])
    distances[real] = table.distances(ids[real])
    found_keys = database.document_keys(found)
    kept = (found >= 0) & ~in_ranges(found, removed)
    for chunk in range(L):  # one chunk's document at a time: all at once would need [n, L, k, L]
        kept &= found_keys != keys[:, chunk, None, None]
    best = np.argsort(~kept, axis=-1, kind="stable")[..., :k]
    kept = np.take_along_axis(kept, best, -1)
    return (
        np.where(kept, np.take_along_axis(found, best, -1), -1),
        np.where(kept, np.take_along_axis(distances, best, -1), np.float32(np.inf)),
    )


def _count(
    ids: np.ndarray, examples: dict[str, np.ndarray], corpus: Corpus, totals: dict[str, int], histogram: np.ndarray
) -> None:
    real = ids >= 0
    totals["sequences"] += len(ids)
    totals["chunks"] += int(real.sum())
    totals["tokens"] += int(corpus.lengths(ids).sum())
    totals["bytes"] += int(examples["bytes"].sum())
    survivors = (examples["neighbour_ids"] >= 0).sum(axis=-1)[real]
    histogram += np.bincount(survivors, minlength=len(histogram))
