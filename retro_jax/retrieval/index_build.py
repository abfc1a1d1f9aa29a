"""The index stage: every chunk that has a vector, in shards that are built each for itself, with measured recall.

A shard is a range of chunk ids, or, where the database is sharded by cluster, the chunks in some cells of a
clustering. Recall is measured against exact search on a sample of the database's own vectors (`probes.py`). Every shard
answers the sample exactly and by its index while its vectors are in memory; the answers are merged at the end, so that
no step needs more than one shard.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter, save_array
from retro_jax.data.distribute import BeamOptions, Unit, distribute
from retro_jax.data.stage import Manifest, ShardWriter, Stage, shard_name
from retro_jax.errors import UserError
from retro_jax.files import TEMPORARY
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.index import (
    CENTROIDS,
    IDS,
    LAYOUT,
    PROBES,
    SCANN,
    SHARD,
    SHARD_OF_CELL,
    shard_folder,
)
from retro_jax.retrieval.index_settings import IndexSettings, shards_for
from retro_jax.retrieval.probes import DEPTHS, draw_probes, exact_answers, measure, merged, recall_at, require_finite
from retro_jax.retrieval.router import Router, fit_cells, group_cells, rows_at_once, squared_to_cells
from retro_jax.retrieval.scann_shard import ScannShard

MIN_RECALL = 0.95
RECALL_QUERIES = 512
_SAMPLE_PER_CELL = 64
_BLOCK = 65_536
_UNIT_TOLERANCE = 1e-3


def build_index(
    embeddings: EmbeddingSet,
    directory: str | os.PathLike,
    settings: IndexSettings | None = None,
    *,
    num_shards: int | None = None,
    cells: int = 0,
    cells_to_visit: int | None = None,
    min_recall: float = MIN_RECALL,
    recall_queries: int = RECALL_QUERIES,
    seed: int = 0,
    options: BeamOptions | None = None,
    last_check: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Manifest:
    """Builds the index of a database; goes on after the last finished shard.

    Args:
      embeddings: the database's.
      directory: to write.
      settings: how to build each shard; None is all by rule and measurement.
      num_shards: None: as few as can be built with `index_settings.BUILD_MEMORY` bytes each.
      cells: 0: a shard is a range of chunk ids and every query visits all; else the cells of the clustering that the
        shards are made of, some 16 to 64 for each shard.
      cells_to_visit: None: as few as reach `min_recall`.
      min_recall: recall@2 that must be reached. It is no part of what the directory is known by.
      recall_queries: size of the sample that recall is measured on.
      seed: of the samples.
      options: where the shards are built.
      last_check: is entered before the manifest is written and left behind it; what it raises on entering keeps the
        index unfinished.

    Raises:
      UserError: too little recall (finished shards stay); a vector that is not finite, no vector at all, a damaged
        shard of the embeddings, settings that do not fit, ScaNN not installed, or the directory belongs to something
        else.
    """
    settings = settings or IndexSettings()
    vectors = embeddings.manifest.counts["chunks"] - embeddings.manifest.counts["empty"]
    if vectors == 0:
        raise UserError(f"{embeddings.directory}: no chunk has a vector, so there is nothing to index")
    if not 0 <= min_recall <= 1:
        raise UserError(f"min_recall must be between 0 and 1, is {min_recall}")
    unit = bool(embeddings.manifest.settings["embedder"].get("normalize"))
    count = num_shards or shards_for(vectors, embeddings.dimension)
    if cells and cells < count:
        raise UserError(f"{cells} cells cannot make {count} shards; give at least as many")
    if cells_to_visit is not None and not 1 <= cells_to_visit <= cells:
        raise UserError(f"cells_to_visit must be between 1 and the number of cells, {cells}; is {cells_to_visit}")
    if count > vectors:
        raise UserError(f"{count} shards are too many for {vectors} vectors")
    settings.resolve(vectors // count, embeddings.dimension, unit=unit)  # refuses what no shard could be built with
    stage_settings = {
        "layout": LAYOUT,
        "metric": "squared_l2",
        "dimension": embeddings.dimension,
        "embedder": embeddings.manifest.settings["embedder"],
        "embedder_fingerprint": embeddings.embedder_fingerprint,
        "index": dataclasses.asdict(settings),
        "num_shards": count,
        "cells": cells,
        "cells_to_visit": cells_to_visit,
        "recall_queries": recall_queries,
        "seed": seed,
    }
    inputs = {"corpus": embeddings.corpus_fingerprint, "embeddings": embeddings.fingerprint}
    with Stage(directory, "index", settings=stage_settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        options = options or BeamOptions()
        if not stage.has(PROBES):
            probes = draw_probes(embeddings, min(recall_queries, vectors), seed)
            with stage.shard(PROBES) as (path, _):
                save_array(path, probes)
        if cells:
            _cluster(stage, embeddings, cells, count, seed, options)
        bounds = np.linspace(0, len(embeddings), count + 1).astype(np.int64).tolist()
        common = {
            "embeddings": str(embeddings.directory.absolute()),
            "shards": count,
            "settings": dataclasses.asdict(settings),
            "unit": unit,
            "min_recall": min_recall,
        }
        units = [
            Unit(
                (f"{shard_folder(number, count)}/{SHARD}",),
                {**common, "number": number, "range": None if cells else bounds[number : number + 2]},
                len(embeddings) // count,
                shard_folder(number, count),
            )
            for number in range(count)
        ]
        distribute(stage, units, build_shard, options, label="index", unit="chunks")
        counts = _totals(stage, embeddings, count)
        counts |= _recall(stage.directory, counts["shard_vectors"], cells, cells_to_visit, min_recall)
        if counts["recall_at_2"] < min_recall:
            raise UserError(_advice(stage.directory, counts, settings, min_recall))
        with last_check():
            return stage.finish(counts | {"min_recall": min_recall})


def build_shard(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Builds one shard of the index and writes its folder at once: two builds of a tree differ, and must not be mixed.

    Args:
      writer: of the stage.
      arguments: "embeddings" directory, "number" of this shard and how many "shards", "settings" as asked for, "unit"
        whether the vectors have length 1, "min_recall", and "range" of chunk ids or None for the cells of the shard.
    """
    embeddings = EmbeddingSet(arguments["embeddings"])
    if arguments["range"]:  # else those who assigned the cells have looked
        embeddings.verify(range(*arguments["range"]))
    ids, vectors = _vectors_of_shard(writer.directory, embeddings, arguments)
    probes = np.load(writer.directory / PROBES, mmap_mode="r", allow_pickle=False)
    answers = exact_answers(probes, vectors, ids)
    settings = IndexSettings("brute_force").resolve(1, embeddings.dimension, unit=arguments["unit"])
    with writer.folder(shard_folder(arguments["number"], arguments["shards"])) as folder:
        if len(ids):
            asked = IndexSettings(**arguments["settings"])
            searcher = ScannShard.build(vectors, asked.resolve(len(ids), embeddings.dimension, unit=arguments["unit"]))
            measure(searcher, probes, vectors, ids, answers, asked, arguments["min_recall"])
            settings = searcher.settings
            scratch = folder.directory / f"{TEMPORARY}{SCANN}"
            for file in searcher.save(scratch):
                with folder.shard(f"{SCANN}/{file.name}") as (path, _):
                    os.replace(file, path)
            scratch.rmdir()
        for name, array in ((IDS, ids), (PROBES, answers)):
            with folder.shard(name) as (path, _):
                save_array(path, array)
        description = {"settings": dataclasses.asdict(settings), "counts": {"vectors": len(ids), "kind": settings.kind}}
        with folder.shard(SHARD) as (path, counts):
            path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            counts.update(description["counts"])


def assign_cells(writer: ShardWriter, arguments: dict[str, Any]) -> None:
    """Writes the cell of every chunk of one shard of the embeddings, int32 [chunks], -1 for chunks without a vector.

    Args:
      writer: of the stage.
      arguments: "embeddings" directory, "first" and "stop" of the chunk ids, "name" of the file.
    """
    embeddings = EmbeddingSet(arguments["embeddings"])
    embeddings.verify(range(arguments["first"], arguments["stop"]))
    centroids = np.load(writer.directory / CENTROIDS, allow_pickle=False)
    sizes, rows = np.zeros(len(centroids), np.int64), rows_at_once(len(centroids))
    with (
        writer.shard(arguments["name"]) as (path, counts),
        ArrayWriter(path, np.dtype("<i4")) as file,
    ):
        for first in range(arguments["first"], arguments["stop"], rows):
            ids = np.arange(first, min(first + rows, arguments["stop"]))
            block = embeddings.vectors(ids)
            require_finite(block, ids, embeddings.directory)
            cells = squared_to_cells(block, centroids).argmin(1)
            cells = np.where(block.any(1), cells, -1).astype(np.int32)
            sizes += np.bincount(cells[cells >= 0], minlength=len(sizes))
            file.append(cells)
            writer.advance(len(ids))
        counts["cells"] = sizes.tolist()


def _cluster(stage: Stage, embeddings: EmbeddingSet, cells: int, shards: int, seed: int, options: BeamOptions) -> None:
    """Learns the cells, assigns every chunk to one, and groups the cells into shards."""
    if not stage.has(CENTROIDS):
        sample = draw_probes(embeddings, _SAMPLE_PER_CELL * cells, seed + 1)["vector"]
        with stage.shard(CENTROIDS) as (path, _):
            save_array(path, fit_cells(sample, cells, seed))
    offsets = np.asarray(embeddings.shard_offsets).tolist()
    names = [_cells_name(i, len(offsets) - 1) for i in range(len(offsets) - 1)]
    units = [
        Unit(
            (name,),
            {"embeddings": str(embeddings.directory.absolute()), "first": first, "stop": stop, "name": name},
            stop - first,
        )
        for name, first, stop in zip(names, offsets[:-1], offsets[1:], strict=True)
    ]
    distribute(stage, units, assign_cells, options, label="cells", unit="chunks")
    if not stage.has(SHARD_OF_CELL):
        weights = np.sum([stage.counts(name)["cells"] for name in names], axis=0)
        centroids = np.load(stage.directory / CENTROIDS, allow_pickle=False)
        with stage.shard(SHARD_OF_CELL) as (path, _):
            save_array(path, group_cells(centroids, weights, shards))


def _vectors_of_shard(
    directory: Path, embeddings: EmbeddingSet, arguments: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(chunk ids int64 [n], vectors float32 [n, E]) of the chunks of a shard that have a vector; all are finite."""
    if arguments["range"]:
        chosen = np.arange(*arguments["range"])
    else:
        mine = np.load(directory / SHARD_OF_CELL, allow_pickle=False) == arguments["number"]
        offsets = np.asarray(embeddings.shard_offsets).tolist()
        parts = []
        for i, first in enumerate(offsets[:-1]):  # the cells of the whole database would not fit
            cells = np.load(directory / _cells_name(i, len(offsets) - 1), allow_pickle=False)
            parts.append(first + np.flatnonzero((cells >= 0) & mine[cells]))
        chosen = np.concatenate(parts)
    ids = np.empty(len(chosen), np.int64)
    vectors = np.empty((len(chosen), embeddings.dimension), np.float32)
    filled = 0
    for first in range(0, len(chosen), _BLOCK):
        some = chosen[first : first + _BLOCK]
        block = embeddings.vectors(some)
        require_finite(block, some, embeddings.directory)
        here = block.any(1)
        if arguments["unit"]:
            lengths = np.square(block[here]).sum(1)
            if (bad := np.flatnonzero(np.abs(lengths - 1) > _UNIT_TOLERANCE)).size:
                raise UserError(
                    f"{embeddings.directory}: the vector of chunk {some[here][bad[0]]} has not length 1, and the "
                    "manifest says that vectors are normalised; embed it again"
                )
        more = int(here.sum())
        ids[filled : filled + more], vectors[filled : filled + more] = some[here], block[here]
        filled += more
    return ids[:filled], vectors[:filled]


def _totals(stage: Stage, embeddings: EmbeddingSet, count: int) -> dict[str, Any]:
    sizes = [stage.counts(f"{shard_folder(number, count)}/{SHARD}")["vectors"] for number in range(count)]
    total = sum(sizes)
    if total != embeddings.manifest.counts["chunks"] - embeddings.manifest.counts["empty"]:
        raise UserError(f"{embeddings.directory}: other empty chunks than its manifest counts; embed the corpus again")
    kinds = sorted({stage.counts(f"{shard_folder(number, count)}/{SHARD}")["kind"] for number in range(count)})
    return {"vectors": total, "empty": len(embeddings) - total, "shard_vectors": sizes, "kinds": kinds}


def _recall(directory: Path, sizes: list[int], cells: int, cells_to_visit: int | None, goal: float) -> dict[str, Any]:
    """Recall of the whole index, and with cells how it grows with those that are visited."""
    probes = np.load(directory / PROBES, allow_pickle=False)
    shards = [np.load(directory / shard_folder(i, len(sizes)) / PROBES, allow_pickle=False) for i in range(len(sizes))]
    everywhere = merged(shards)
    counts: dict[str, Any] = {"recall_queries": len(probes)}
    if not cells:
        return counts | {f"recall_at_{k}": round(recall_at(k, probes, everywhere), 4) for k in DEPTHS}
    centroids = np.load(directory / CENTROIDS, allow_pickle=False)
    of_cell = np.load(directory / SHARD_OF_CELL, allow_pickle=False)
    routing = []
    for visited in [cells_to_visit] if cells_to_visit else _ladder(cells):
        router = Router(centroids, of_cell, visited, np.asarray(sizes))
        visits = router.visits(probes["vector"], 1)
        answers = merged(shards, visits)
        routing.append(
            {
                "cells": visited,
                "shards": round(float(visits.sum(1).mean()), 2),
                **{f"recall_at_{k}": round(recall_at(k, probes, answers), 4) for k in DEPTHS},
            }
        )
        if routing[-1]["recall_at_2"] >= goal:
            break
    last = routing[-1]
    return counts | {
        "cells_to_visit": last["cells"],
        "shards_visited": last["shards"],
        **{f"recall_at_{k}": last[f"recall_at_{k}"] for k in DEPTHS},
        "recall_at_2_of_all_shards": round(recall_at(2, probes, everywhere), 4),
        "routing": routing,
    }


def _ladder(cells: int) -> list[int]:
    """Numbers of cells to try: 1, 2, 3, 4, 6, 8, 12, ... and all."""
    steps = sorted({*(2**i for i in range(32)), *(3 * 2**i for i in range(32))})
    return [step for step in steps if step < cells] + [cells]


def _cells_name(index: int, count: int) -> str:
    return shard_name("cells/cells", index, count, ".npy")


def _advice(directory: Path, counts: dict[str, Any], settings: IndexSettings, floor: float) -> str:
    """What to do about too little recall."""
    remedies = []
    if "routing" in counts:
        remedies.append(f"visit more cells (--cells_to_visit, now {counts['cells_to_visit']})")
    if settings.leaves_to_search:
        remedies.append(f"search more leaves (--leaves_to_search, now {settings.leaves_to_search})")
    remedies.append("rescore more candidates (--reorder)")
    return (
        f"{directory}: recall@2 is {counts['recall_at_2']:.4f}, the floor is {floor}: {' or '.join(remedies)} in "
        f"another directory, or accept it with --min_recall={int(100 * counts['recall_at_2']) / 100:.2f}, which keeps "
        "what is built"
    )
