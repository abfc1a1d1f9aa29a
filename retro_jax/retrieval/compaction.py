"""Compaction: a database with additions and removals, written anew as one base without what was removed.

Tokens and vectors are copied, not made again; chunk ids are counted anew, so neighbours are to be found again. The
corpus and the embeddings are stages whose unit is a shard of the old ones; the index is built from them.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.corpus import TOKENIZER_FILE, Corpus
from retro_jax.data.distribute import BeamOptions, Unit, distribute
from retro_jax.data.ranges import in_ranges
from retro_jax.data.stage import Manifest, ShardWriter, Stage, shard_name
from retro_jax.errors import UserError
from retro_jax.lock import DirectoryLock
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.index_build import MIN_RECALL, build_index
from retro_jax.retrieval.index_settings import IndexSettings
from retro_jax.retrieval.segments import ADDITIONS, DatabaseCorpus, Segments
from retro_jax.retrieval.update import REMEDY, compacted_fingerprint

_BLOCK = 16_384
_COUNTS = ("documents", "chunks", "tokens", "bytes", "complete_chunks")


def compact_database(
    directory: str | os.PathLike,
    output: str | os.PathLike,
    *,
    settings: IndexSettings | None = None,
    num_shards: int | None = None,
    min_recall: float = MIN_RECALL,
    options: BeamOptions | None = None,
) -> Manifest:
    """Writes the compacted database; goes on after the last finished shard.

    Args:
      directory: of the database; it is only read, and locked for a moment at the end.
      output: directory of the new one.
      settings, num_shards, min_recall: of its index.
      options: where the shards are worked off.

    Returns:
      The manifest of the new corpus.

    Raises:
      UserError: every document was removed; the output holds something else, also a compaction from before a change;
        the database was changed meanwhile, or is being changed: what was removed then must not come back.
    """
    output, options = Path(output), options or BeamOptions()
    corpus = DatabaseCorpus(directory)

    @contextlib.contextmanager
    def unchanged() -> Iterator[None]:
        with DirectoryLock(directory, REMEDY):  # else a change could come between this look and the manifest
            now = Segments.load(directory).version
            if now != corpus.segments.version:
                raise UserError(
                    f"{directory} was changed while it was compacted (version {corpus.segments.version}, now {now}): "
                    f"remove {output} and compact it again"
                )
            yield

    folders = [corpus.directory, *(corpus.directory / ADDITIONS / name for name in corpus.segments.additions)]
    manifest = _copy_corpus(corpus, output / "corpus", options)
    _copy_embeddings(corpus, folders, output / "embeddings", manifest, options)
    build_index(
        EmbeddingSet(output / "embeddings"),
        output / "index",
        settings,
        num_shards=num_shards,
        min_recall=min_recall,
        options=options,
        last_check=unchanged,
    )
    return manifest


def copy_corpus_shard(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Copies the documents of one shard that are not removed.

    Args:
      writer: of the stage.
      arguments: "corpus" directory and "shard" of it, "removed" ranges of the shard's own chunk numbers, and "names" of
        the files to write: documents (.jsonl), documents (.npy), chunks.
    """
    source = Corpus(arguments["corpus"])
    place = arguments["shard"], len(source.shard_offsets) - 1
    source.verify(range(*source.shard_offsets[arguments["shard"] : arguments["shard"] + 2].tolist()))
    records = source.directory / shard_name("documents", *place, ".jsonl")
    rows = np.load(source.directory / shard_name("documents", *place, ".npy"), mmap_mode="r", allow_pickle=False)
    keep = ~in_ranges(rows["first_chunk"], np.asarray(arguments["removed"], np.int64).reshape(-1, 2))
    number = np.cumsum(keep) - 1
    old = np.load(source.directory / shard_name("chunks", *place, ".npy"), mmap_mode="r", allow_pickle=False)
    totals = dict.fromkeys(_COUNTS, 0)
    with (
        writer.shard(arguments["names"][0]) as (records_path, _),
        writer.shard(arguments["names"][1]) as (documents_path, _),
        writer.shard(arguments["names"][2]) as (chunks_path, counts),
    ):
        kept = np.array(rows[keep])
        with open(records, "rb") as lines, open(records_path, "wb") as file:
            for line, here in zip(lines, keep.tolist(), strict=True):
                if here:
                    kept["offset"][totals["documents"]] = file.tell()
                    file.write(line)
                    totals["documents"] += 1
        kept["first_chunk"] = np.cumsum(kept["chunks"]) - kept["chunks"]
        with ArrayWriter(documents_path, rows.dtype) as file:
            file.append(kept)
        with ArrayWriter(chunks_path, old.dtype) as file:
            for first in range(0, len(old), _BLOCK):
                block = old[first : first + _BLOCK]
                block = np.array(block[keep[block["document"]]])
                block["document"] = number[block["document"]]
                file.append(block)
                totals["chunks"] += len(block)
                totals["tokens"] += int(block["length"].sum())
                totals["bytes"] += int(block["bytes"].sum(dtype=np.int64))
                totals["complete_chunks"] += int((block["length"] == source.chunk_length).sum())
        counts.update(totals)


def copy_embeddings_shard(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Copies the vectors of one range of chunks that are not removed.

    Args:
      writer: of the stage.
      arguments: "embeddings" directory, "first" and "stop" of its chunk ids, "removed" ranges of them, "name".
    """
    source = EmbeddingSet(arguments["embeddings"])
    source.verify(range(arguments["first"], arguments["stop"]))
    removed = np.asarray(arguments["removed"], np.int64).reshape(-1, 2)
    chunks = empty = 0
    with (
        writer.shard(arguments["name"]) as (path, counts),
        ArrayWriter(path, np.dtype("<f4"), (source.dimension,)) as file,
    ):
        for first in range(arguments["first"], arguments["stop"], _BLOCK):
            ids = np.arange(first, min(first + _BLOCK, arguments["stop"]))
            block = source.vectors(ids[~in_ranges(ids, removed)])
            file.append(block)
            chunks += len(block)
            empty += int((~block.any(1)).sum())
        counts.update(chunks=chunks, empty=empty)


def _copy_corpus(corpus: DatabaseCorpus, output: Path, options: BeamOptions) -> Manifest:
    base = corpus.parts[0]
    inputs = {"tokenizer": base.tokenizer_fingerprint, "database": compacted_fingerprint(corpus)}
    with Stage(output, "corpus", settings=base.manifest.settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        total = sum(len(part.shard_offsets) - 1 for part in corpus.parts)
        units = []
        for part, offset in zip(corpus.parts, corpus.offsets[:-1].tolist(), strict=True):
            for shard, first in enumerate(part.shard_offsets[:-1].tolist()):
                names = (
                    shard_name("documents", len(units), total, ".jsonl"),
                    shard_name("documents", len(units), total, ".npy"),
                    shard_name("chunks", len(units), total, ".npy"),
                )
                stop = int(part.shard_offsets[shard + 1])
                removed = _within(corpus.segments.removed, offset + first, offset + stop).tolist()
                arguments = {"corpus": str(part.directory.absolute()), "shard": shard, "names": names}
                units.append(Unit(names, {**arguments, "removed": removed}, stop - first))
        distribute(stage, units, copy_corpus_shard, options, label="corpus", unit="chunks")
        counts = {key: sum(stage.counts(unit.shards[2])[key] for unit in units) for key in _COUNTS}
        if counts["chunks"] == 0:
            stage.discard()
            raise UserError(f"{corpus.directory}: nothing is left of it, so there is no database to write")
        with stage.shard(TOKENIZER_FILE) as (path, _):
            shutil.copyfile(base.directory / TOKENIZER_FILE, path)
        return stage.finish(counts)


def _copy_embeddings(
    corpus: DatabaseCorpus, folders: list[Path], output: Path, manifest: Manifest, options: BeamOptions
) -> None:
    sets = [EmbeddingSet(folder / "embeddings") for folder in folders]
    inputs = {"corpus": manifest.fingerprint, "tokenizer": corpus.tokenizer_fingerprint}
    with Stage(output, "embeddings", settings=sets[0].manifest.settings, inputs=inputs) as stage:
        if stage.complete:
            return
        total = sum(len(each.shard_offsets) - 1 for each in sets)
        units = []
        for each, offset in zip(sets, corpus.offsets[:-1].tolist(), strict=True):
            offsets = each.shard_offsets.tolist()
            for first, stop in itertools.pairwise(offsets):
                name = shard_name("embeddings", len(units), total, ".npy")
                removed = (_within(corpus.segments.removed, offset + first, offset + stop) + first).tolist()
                arguments = {"embeddings": str(each.directory.absolute()), "first": first, "stop": stop, "name": name}
                units.append(Unit((name,), {**arguments, "removed": removed}, stop - first))
        distribute(stage, units, copy_embeddings_shard, options, label="embeddings", unit="chunks")
        counts = {key: sum(stage.counts(unit.shards[0])[key] for unit in units) for key in ("chunks", "empty")}
        # How many of the removed chunks had been cut is not known any more.
        stage.finish(counts | {"cut": sum(each.manifest.counts["cut"] for each in sets)})


def _within(ranges: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Those parts of ranges [r, 2] that lie in [first, stop), counted from `first`."""
    cut = np.clip(ranges, first, stop) - first
    return cut[cut[:, 0] < cut[:, 1]]
