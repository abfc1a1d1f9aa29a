"""One shard of the index in ScaNN: build, save, load, search. The one file that touches ScaNN.

Its edges (measured with scann 1.4.2) are guarded here:

- a non-finite row aborts the whole process at build: every row is checked before;
- a non-finite query is answered with id 0 and distance NaN: refused by the caller, `Index.search`;
- too few candidates are padded with id 0 and distance NaN: searched again in every leaf, then row -1;
- distances of a brute-force batch carry rounding that a single query's do not: they are rescored;
- k above the reordering depth cuts the answer without a word: the depth follows k;
- `serialize` writes absolute paths unless told not to, and a flipped byte loads: relative paths, the stage's checksums;
- its `docids` are a pickle: never written, and refused when found; chunk ids are an array of our own;
- a tree finds other candidates for a query alone than in a batch (both approximate; the same batch, the same answer);
- two builds of the same data differ: the manifest's checksums make the fingerprint, which neighbours record;
- `import scann` fails beside a TensorFlow it was not built for: its TensorFlow operations are left out.
"""

import shutil
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrieval.index_settings import IndexSettings

_PARALLEL_BATCH = 256
_OPERATIONS = "scann.scann_ops.py.scann_ops"


class ScannShard:
    """Vectors that can be searched by row.

    Attributes:
      settings: resolved.
      size: vectors.
    """

    def __init__(self, searcher: Any, settings: IndexSettings, size: int) -> None:
        self._searcher = searcher
        self.settings = settings
        self.size = size

    @classmethod
    def build(cls, vectors: np.ndarray, settings: IndexSettings) -> "ScannShard":
        """Builds it in memory.

        Args:
          vectors: [n, E] float32, finite; of length 1 when the score is the dot product.
          settings: resolved for them; `leaves_to_search` may be None.
        """
        library = _scann()
        builder = library.builder(vectors, min(10, len(vectors)), settings.score)
        if settings.kind == "brute_force":
            # Rescored, because a batch's distances are |q|^2 - 2 q.x + |x|^2, which cancels, and a single query's are
            # not: the answer must not depend on which queries are asked together.
            return cls(builder.score_brute_force().reorder(settings.reorder).build(), settings, len(vectors))
        builder = builder.tree(
            settings.num_leaves,
            settings.leaves_to_search or settings.num_leaves,
            training_sample_size=settings.training_sample,
            soar_lambda=settings.spill or None,
            avq=settings.leaf_eta or None,
        )
        # The anisotropic loss favours large inner products; under L2 it costs recall, NaN switches it off.
        builder = builder.score_ah(
            settings.dimensions_per_block,
            anisotropic_quantization_threshold=0.2 if settings.score == "dot_product" else float("nan"),
            training_sample_size=settings.training_sample,
        )
        kinds = _reorder_kinds()
        builder = builder.reorder(settings.reorder, kinds[settings.rescore])
        return cls(builder.build(), settings, len(vectors))

    @classmethod
    def load(cls, folder: Path, settings: IndexSettings, size: int, listed: Iterable[str]) -> "ScannShard":
        """Loads what `save` wrote, wherever it was moved.

        Args:
          folder: with ScaNN's files.
          settings: that it was built with.
          size: vectors in it.
          listed: names of the files that belong there.

        Raises:
          UserError: a file that does not belong there, files that ScaNN cannot read; ScaNN not installed.
        """
        names = set(listed)
        for file in sorted(folder.iterdir()):
            # ScaNN would unpickle a scann_docids.pkl that somebody put here.
            if file.name not in names:
                raise UserError(f"{file}: not part of the index; remove it")
        try:
            searcher = _scann().load_searcher(str(folder), assets_backcompat_shim=False)
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: ScaNN cannot load it ({reason}); rebuild the index") from None
        return cls(searcher, settings, size)

    def save(self, folder: Path) -> list[Path]:
        """Writes ScaNN's files into a folder, which is emptied first, and gives them in order of name.

        Raises:
          UserError: ScaNN cannot write there.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            self._searcher.serialize(str(folder), relative_path=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: ScaNN cannot write there ({reason}); is the disk full?") from None
        return sorted(folder.iterdir())

    def search(
        self, queries: np.ndarray, k: int, *, leaves: int | None = None, reorder: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest vectors of each query, in no particular order of equals. Releases Python's lock.

        Args:
          queries: [q, E] float32, finite, q at least 1.
          k: 1 to `size`.
          leaves, reorder: other than the settings' own.

        Returns:
          rows int64 [q, k] and squared L2 distances float32 [q, k]; all k places are filled but for -1 and +inf where
          even every leaf has no more.
        """
        rows, scores = self._ask(queries, k, leaves or self.settings.leaves_to_search, reorder)
        if short := np.flatnonzero(~np.isfinite(scores).all(1)).tolist():
            # The visited leaves held fewer than k vectors.
            rows[short], scores[short] = self._ask(queries[short], k, self.settings.num_leaves, reorder)
        found = np.isfinite(scores)
        if self.settings.score == "dot_product":
            scores = (np.einsum("qe,qe->q", queries, queries)[:, None] + np.float32(1)) - 2 * scores
        return np.where(found, rows, -1), np.where(found, np.maximum(scores, 0), np.inf).astype(np.float32, copy=False)

    def _ask(
        self, queries: np.ndarray, k: int, leaves: int | None, reorder: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [q, k] and scores float32 [q, k]; a NaN is no result and its row means nothing."""
        depth = min(self.size, max(reorder or self.settings.reorder, 4 * k))
        options: dict[str, int] = {"final_num_neighbors": k, "pre_reorder_num_neighbors": depth}
        if self.settings.kind == "tree":
            options["leaves_to_search"] = leaves or self.settings.num_leaves
        # In parallel it is taken apart into batches of this size; a small one is quicker without threads.
        parallel = len(queries) > _PARALLEL_BATCH
        ask = self._searcher.search_batched_parallel if parallel else self._searcher.search_batched
        rows, scores = ask(queries, **options)
        if rows.shape != (len(queries), k) or scores.shape != rows.shape:
            raise RuntimeError(f"ScaNN answered {rows.shape} to {len(queries)} queries for {k} neighbours")
        return rows.astype(np.int64), scores


def _reorder_kinds() -> dict[str, Any]:
    from scann.scann_ops.py.scann_builder import ReorderType

    return {"float32": ReorderType.FLOAT32, "bfloat16": ReorderType.BFLOAT16}


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
