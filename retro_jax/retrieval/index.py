"""Approximate nearest neighbours with ScaNN: build, save, load, search. The one file that touches ScaNN.

Its edges (measured with scann 1.4.2) are guarded here:

- a non-finite row aborts the whole process at build: every row is checked before;
- a non-finite query is answered with id 0 and distance NaN: refused;
- too few candidates are padded with id 0 and distance NaN: searched again in every leaf, then id -1;
- distances of a brute-force batch carry rounding that a single query's do not: they are rescored;
- k above the reordering depth cuts the answer without a word: the depth follows k;
- `serialize` writes absolute paths unless told not to, and a flipped byte loads: relative paths, own checksums;
- its `docids` are a pickle: never written, and refused when found; chunk ids are an array of our own;
- a tree finds other candidates for a query alone than in a batch (both approximate; the same batch, the same answer);
- two builds of the same data differ: the manifest's checksums make the fingerprint, which neighbours record;
- `import scann` fails beside a TensorFlow it was not built for: its TensorFlow operations are left out.
"""

import dataclasses
import math
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.stage import Manifest, Stage, load_manifest, verify_checksums
from retro_jax.errors import UserError
from retro_jax.progress import Progress
from retro_jax.retrieval.embedder import EmbeddingSet
from retro_jax.retrieval.exact import exact_search, recall

BRUTE_FORCE_LIMIT = 20_000
RECALL_QUERIES = 256
KINDS = ("auto", "brute_force", "tree")
_SCANN_FOLDER = "scann"
_SCRATCH = "scann-unfinished"
_IDS = "ids.npy"
_MIN_TREE_VECTORS = 64  # fewer cannot train 16 codes a block and leaves
_BLOCK = 65_536
_OPERATIONS = "scann.scann_ops.py.scann_ops"


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """How an index is built; None and "auto" are chosen by the number of vectors n.

    Attributes:
      kind: "brute_force" (exact; auto for n <= 20,000), "tree" (k-means leaves, 4-bit product codes, rescoring of the
        best in float32), or "auto".
      num_leaves: leaves of the tree; None: sqrt(n).
      leaves_to_search: leaves a query visits; None: a tenth of the leaves, at least 8.
      reorder: candidates rescored exactly, raised to 4k at search when that is more; None: 128.
      dimensions_per_block: components that share a 4-bit code.
      training_sample: vectors that leaves and codes are learnt from.
    """

    kind: str = "auto"
    num_leaves: int | None = None
    leaves_to_search: int | None = None
    reorder: int | None = None
    dimensions_per_block: int = 2
    training_sample: int = 100_000

    def resolve(self, n: int) -> "IndexSettings":
        """The settings with every choice made for n vectors.

        Raises:
          UserError: a setting out of range, or too few vectors for a tree.
        """
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        for name in ("num_leaves", "leaves_to_search", "reorder", "dimensions_per_block", "training_sample"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, is {value}")
        kind = self.kind
        if kind == "auto":
            kind = "brute_force" if n <= BRUTE_FORCE_LIMIT else "tree"
        if kind == "brute_force":
            return IndexSettings(kind="brute_force", reorder=self.reorder or 128)
        if n < _MIN_TREE_VECTORS:
            raise UserError(f"a tree needs at least {_MIN_TREE_VECTORS} vectors, there are {n}; use kind brute_force")
        num_leaves = self.num_leaves or round(math.sqrt(n))
        if num_leaves > n // 2:
            raise UserError(f"num_leaves {num_leaves} is too many for {n} vectors; at most {n // 2}")
        leaves_to_search = self.leaves_to_search or max(8, math.ceil(num_leaves / 10))
        return dataclasses.replace(
            self,
            kind=kind,
            num_leaves=num_leaves,
            leaves_to_search=min(leaves_to_search, num_leaves),
            reorder=self.reorder or 128,
            training_sample=min(self.training_sample, n),
        )


def build_index(
    embeddings: EmbeddingSet,
    directory: str | os.PathLike,
    settings: IndexSettings | None = None,
    *,
    recall_queries: int = RECALL_QUERIES,
    seed: int = 0,
) -> Manifest:
    """The index stage: every chunk that has a vector, searchable; with recall measured against exact search.

    Recall is measured on a sample of the database's own chunks, each leaving itself out as a search of neighbours does.
    ScaNN needs all vectors in memory at once: 4 E bytes each, twice.

    Args:
      embeddings: the database's.
      directory: to write.
      settings: how to build; None is all automatic.
      recall_queries: size of the sample.
      seed: of the sample.

    Raises:
      UserError: a vector that is not finite, no vector at all, settings that do not fit, ScaNN not installed, or the
        directory belongs to something else.
    """
    vectors_count = embeddings.manifest.counts["chunks"] - embeddings.manifest.counts["empty"]
    if vectors_count == 0:
        raise UserError(f"{embeddings.directory}: no chunk has a vector, so there is nothing to index")
    resolved = (settings or IndexSettings()).resolve(vectors_count)
    stage_settings = {
        "metric": "squared_l2",
        "dimension": embeddings.dimension,
        "embedder": embeddings.manifest.settings["embedder"],
        "embedder_fingerprint": embeddings.embedder_fingerprint,
        "index": dataclasses.asdict(resolved),
    }
    inputs = {"corpus": embeddings.corpus_fingerprint, "embeddings": embeddings.fingerprint}
    with Stage(directory, "index", settings=stage_settings, inputs=inputs) as stage:
        if stage.complete:
            return stage.manifest
        ids, vectors = _load_vectors(embeddings, vectors_count)
        searcher = _build(vectors, resolved)
        _save(searcher, stage)
        with stage.shard(_IDS) as (path, _), open(path, "wb") as file:
            np.save(file, ids, allow_pickle=False)
        index = Index(searcher, ids, resolved, embeddings.dimension, None)
        counts = {"vectors": len(ids), "empty": len(embeddings) - len(ids)}
        counts |= _measure_recall(index, vectors, ids, min(recall_queries, len(ids)), seed)
        return stage.finish(counts)


class Index:
    """A searchable index, made by `Index.load`.

    Attributes:
      manifest: of the index stage.
      settings: resolved `IndexSettings`.
      dimension: E.
      size: vectors in it.
      embedder_fingerprint, corpus_fingerprint, fingerprint: what it was made with and from, and what it is.
    """

    def __init__(
        self, searcher: Any, ids: np.ndarray, settings: IndexSettings, dimension: int, manifest: Manifest | None
    ) -> None:
        self._searcher = searcher
        self._ids = ids
        self.settings = settings
        self.dimension = dimension
        self.manifest = manifest

    @classmethod
    def load(cls, directory: str | os.PathLike, *, verify: bool = True) -> "Index":
        """Loads a finished index directory, wherever it was moved.

        Args:
          directory: output of the index stage.
          verify: compare all checksums first; without, a damaged file may load and answer wrongly.

        Raises:
          UserError: incomplete, damaged, or not an index; ScaNN not installed.
        """
        directory = Path(directory)
        manifest = load_manifest(directory, "index")
        folder = directory / _SCANN_FOLDER
        listed = {shard.name for shard in manifest.shards}
        for file in sorted(folder.iterdir()):
            # ScaNN would unpickle a scann_docids.pkl that somebody put here.
            if f"{_SCANN_FOLDER}/{file.name}" not in listed:
                raise UserError(f"{file}: not part of the index; remove it")
        if verify:
            verify_checksums(directory, manifest)
        ids = _load_ids(directory / _IDS, manifest.counts["vectors"])
        try:
            searcher = _scann().load_searcher(str(folder), assets_backcompat_shim=False)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: ScaNN cannot load it ({reason}); rebuild the index") from None
        settings = IndexSettings(**manifest.settings["index"])
        return cls(searcher, ids, settings, manifest.settings["dimension"], manifest)

    @property
    def size(self) -> int:
        return len(self._ids)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def embedder_fingerprint(self) -> str:
        return self.manifest.settings["embedder_fingerprint"]

    @property
    def corpus_fingerprint(self) -> str:
        return self.manifest.inputs["corpus"]

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest chunks of each query, nearest first, by squared L2.

        Thread-safe; the search runs outside Python's lock.

        Args:
          queries: [q, E] float32; q may be 0.
          k: at least 1; may exceed the number of vectors.

        Returns:
          ids int64 [q, k] of corpus chunks and distances float32 [q, k]. All min(k, size) places are filled, the rest
          is -1 and +inf.

        Raises:
          UserError: wrong shape, a query that is not finite, or k < 1.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise UserError(f"queries have shape {queries.shape}, the index takes [q, {self.dimension}]")
        if k < 1:
            raise UserError(f"k must be at least 1, is {k}")
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            bad = int(np.flatnonzero(~np.isfinite(queries).all(1))[0])
            raise UserError(f"query {bad} is not finite")
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        if not len(queries):
            return ids, distances
        count = min(k, self.size)
        rows, squares = self._search(queries, count, self.settings.leaves_to_search)
        if short := np.flatnonzero(~np.isfinite(squares).all(1)).tolist():
            # The visited leaves held fewer than `count` vectors.
            rows[short], squares[short] = self._search(queries[short], count, self.settings.num_leaves)
        order = np.argsort(squares, axis=1, kind="stable")
        rows, squares = np.take_along_axis(rows, order, 1), np.take_along_axis(squares, order, 1)
        found = np.isfinite(squares)
        ids[:, :count] = np.where(found, self._ids[np.where(found, rows, 0)], -1)
        distances[:, :count] = np.where(found, np.maximum(squares, 0), np.inf)
        return ids, distances

    def _search(self, queries: np.ndarray, k: int, leaves: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 [q, k] and squares float32 [q, k]; NaN is no result and its position means nothing."""
        depth = min(self.size, max(self.settings.reorder, 4 * k))
        options: dict[str, int] = {"final_num_neighbors": k, "pre_reorder_num_neighbors": depth}
        if self.settings.kind == "tree":
            options["leaves_to_search"] = leaves
        rows, squares = self._searcher.search_batched_parallel(queries, **options)
        if rows.shape != (len(queries), k) or squares.shape != rows.shape:
            raise RuntimeError(f"ScaNN answered {rows.shape} to {len(queries)} queries for {k} neighbours")
        return rows.astype(np.int64), squares


def _load_vectors(embeddings: EmbeddingSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(chunk ids int64 [n], vectors float32 [n, E]) of all chunks that have a vector; every one is finite."""
    ids = np.empty(count, np.int64)
    vectors = np.empty((count, embeddings.dimension), np.float32)
    filled = 0
    with Progress("loading vectors", total=len(embeddings), unit="chunks") as progress:
        for first in range(0, len(embeddings), _BLOCK):
            block = embeddings[first : first + _BLOCK]
            finite = np.isfinite(block).all(1)
            if not finite.all():
                bad = first + int(np.flatnonzero(~finite)[0])
                raise UserError(f"{embeddings.directory}: the vector of chunk {bad} is not finite; embed it again")
            here = np.flatnonzero(block.any(1))
            if filled + len(here) > count:
                break
            ids[filled : filled + len(here)] = first + here
            vectors[filled : filled + len(here)] = block[here]
            filled += len(here)
            progress.update(len(block))
    if filled != count:
        raise UserError(f"{embeddings.directory}: other empty chunks than its manifest counts; embed the corpus again")
    return ids, vectors


def _build(vectors: np.ndarray, settings: IndexSettings) -> Any:
    builder = _scann().builder(vectors, min(10, len(vectors)), "squared_l2")
    if settings.kind == "brute_force":
        # Rescored, because a batch's distances are |q|^2 - 2 q.x + |x|^2, which cancels, and a single query's are not:
        # the answer must not depend on which queries are asked together.
        return builder.score_brute_force().reorder(settings.reorder).build()
    builder = builder.tree(
        settings.num_leaves, settings.leaves_to_search, training_sample_size=settings.training_sample
    )
    builder = builder.score_ah(
        min(settings.dimensions_per_block, vectors.shape[1]),
        # The anisotropic loss favours inner products; under L2 it costs recall, NaN switches it off.
        anisotropic_quantization_threshold=float("nan"),
        training_sample_size=settings.training_sample,
    )
    return builder.reorder(settings.reorder).build()


def _save(searcher: Any, stage: Stage) -> None:
    """Puts ScaNN's files into the stage; those of an interrupted build belong to another tree and are written again."""
    scratch = stage.directory / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        searcher.serialize(str(scratch), relative_path=True)
        for file in sorted(scratch.iterdir()):
            with stage.shard(f"{_SCANN_FOLDER}/{file.name}") as (path, _):
                os.replace(file, path)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{scratch}: ScaNN cannot write there ({reason}); is the disk full?") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure_recall(index: Index, vectors: np.ndarray, ids: np.ndarray, sample: int, seed: int) -> dict[str, Any]:
    """Recall@2 and @10 on a sample of the database's own vectors, each without itself."""
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), sample, replace=False))
    queries = vectors[rows]
    found, _ = index.search(queries, 11)
    position = np.full(int(ids[-1]) + 1, -1, np.int64)
    position[ids] = np.arange(len(ids))
    found = np.where(found >= 0, position[found], -1)
    exact_ids, exact_distances = exact_search(queries, vectors, 11)
    measured: dict[str, Any] = {"recall_queries": sample}
    for k in (2, 10):
        # Of 11 neighbours the first k that are not the query itself.
        without_self = _drop(found, rows, k)
        keep = exact_ids != rows[:, None]
        order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
        distances = np.where(keep, exact_distances, np.inf)
        measured[f"recall_at_{k}"] = round(
            recall(without_self, np.take_along_axis(distances, order, 1), queries, vectors), 4
        )
    return measured


def _drop(ids: np.ndarray, unwanted: np.ndarray, k: int) -> np.ndarray:
    """The first k of every row that are not the row's unwanted id; -1 where there are fewer."""
    keep = (ids != unwanted[:, None]) & (ids >= 0)
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(np.where(keep, ids, -1), order, axis=1)


def _load_ids(path: Path, count: int) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not a NumPy array ({error}); rebuild the index") from None
    if ids.shape != (count,) or ids.dtype != np.int64:
        raise UserError(f"{path}: {ids.dtype} {ids.shape}, expected int64 ({count},); rebuild the index")
    return ids


def _scann() -> types.ModuleType:
    """ScaNN's searcher module, imported without its TensorFlow operations and without starting TensorFlow."""
    if _OPERATIONS not in sys.modules:
        sys.modules[_OPERATIONS] = types.ModuleType(_OPERATIONS)
    hide = "tensorflow" not in sys.modules
    if hide:
        sys.modules["tensorflow"] = None  # an import now raises ModuleNotFoundError, which ScaNN expects
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"the index needs ScaNN: pip install 'retro_jax[data]' ({' '.join(str(error).split())[:120]})"
        ) from None
    finally:
        if hide:
            del sys.modules["tensorflow"]
    return scann_ops_pybind
