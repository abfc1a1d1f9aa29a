"""How an index is built: what a person may choose, and the rules that choose the rest from n vectors of d components.

The rules, in one place (n: vectors of a shard, d: their components):

| what | rule |
| --- | --- |
| shards | as few as hold the vectors when building one may take `BUILD_MEMORY` bytes |
| kind | brute force up to 20,000 vectors, a tree of product codes above |
| score | inner product where all vectors have length 1 (the same order, and better codes), else squared L2 |
| leaves | 1.4 sqrt(n) with the inner product, sqrt(n) with L2 |
| centres of leaves | with the inner product by the anisotropic loss, eta 4 |
| second leaves | with the inner product every vector is in two leaves (SOAR, weight 1) |
| components a code | 2; as many more as keep a vector at 256 codes, above which ScaNN is slow |
| leaves searched | measured at the build: as few as reach the recall that is asked for |
| rescored | 24 candidates, or 48, 96, ... where that does not reach it; 4k at a search of k when that is more |
| rescored in | bfloat16 with the inner product (half the memory), float32 with L2 |

Measured on 98,000 chunks of text, 384 components of length 1, CPU time of one core, recall@2 of 0.952 to 0.957: 46
microseconds a query with 2 sqrt(n) leaves learnt by k-means alone, 41 with 1.3 sqrt(n) and eta 4, 41.5 with 1.6 sqrt(n)
and eta 8. tools/tune_index.py measures it for a database and a machine.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

from retro_jax.errors import UserError

BRUTE_FORCE_LIMIT = 20_000
BUILD_MEMORY = 32 * 10**9
KINDS = ("auto", "brute_force", "tree")
SCORES = ("dot_product", "squared_l2")
RESCORINGS = ("float32", "bfloat16")
_MIN_TREE_VECTORS = 64  # fewer cannot train 16 codes a block and leaves
_LEAVES = 1.4
_LEAF_ETA = 4.0
_MOST_CODES = 256  # of a vector, for ScaNN's quick path
_NUMBER = float | None
_IN_WORDS = {
    str: "a text",
    str | None: "a text or null",
    int: "a whole number",
    int | None: "a whole number or null",
    _NUMBER: "a number or null",
}


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """How an index is built; None and "auto" are chosen by the rules of this module.

    Attributes:
      kind: "brute_force" (exact), "tree" (k-means leaves, 4-bit product codes, rescoring of the best), or "auto".
      score: "dot_product" (only for vectors of length 1) or "squared_l2". Answers are squared L2 distances always.
      num_leaves: leaves of the tree.
      leaves_to_search: leaves a query visits.
      reorder: candidates rescored, raised to 4k at a search of more.
      rescore: "float32", or "bfloat16", which halves the memory and rounds the distances (to 1e-3 of length 1).
      dimensions_per_block: components that share a 4-bit code.
      spill: weight with which every vector is put into a second leaf (SOAR); 0 for one leaf. Needs the dot product.
      leaf_eta: how much more the part of an error along the vector counts than the rest when the centres of the leaves
        are computed (anisotropic loss, Guo et al. 2020, section 3); 0 for k-means alone. Needs the dot product.
      training_sample: vectors that leaves and codes are learnt from.
    """

    kind: str = "auto"
    score: str | None = None
    num_leaves: int | None = None
    leaves_to_search: int | None = None
    reorder: int | None = None
    rescore: str | None = None
    dimensions_per_block: int | None = None
    spill: float | None = None
    leaf_eta: float | None = None
    training_sample: int = 100_000

    @classmethod
    def load(cls, path: str | os.PathLike) -> "IndexSettings":
        """Reads settings from a JSON file: an object of any of the attributes, or one that has it as "settings".

        Raises:
          UserError: no such file, or another kind of content.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            settings = cls(**value.get("settings", value))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; write one with tools/tune_index.py") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: no settings of an index ({str(error).replace('__init__() ', '')})") from None
        for field in dataclasses.fields(cls):
            value, kind = getattr(settings, field.name), field.type
            if isinstance(value, bool) or not isinstance(value, kind | int if kind == _NUMBER else kind):
                raise UserError(f"{path}: {field.name} is {json.dumps(value)}, expected {_IN_WORDS[kind]}")
        return settings

    def resolve(self, n: int, dimension: int, *, unit: bool) -> "IndexSettings":
        """The settings with every choice made, but for `leaves_to_search`, which may be left to measurement.

        Args:
          n: vectors of the shard.
          dimension: d.
          unit: whether all vectors have length 1.

        Raises:
          UserError: a setting out of range, or too few vectors for a tree.
        """
        self.check(unit=unit)
        kind = self.kind
        if kind == "auto":
            kind = "brute_force" if n <= BRUTE_FORCE_LIMIT else "tree"
        if kind == "brute_force":
            # Rescored, because a batch's distances cancel; see scann_shard.py.
            return IndexSettings(
                kind, "squared_l2", reorder=self.reorder or 128, rescore="float32", spill=0.0, leaf_eta=0.0
            )
        if n < _MIN_TREE_VECTORS:
            raise UserError(f"a tree needs at least {_MIN_TREE_VECTORS} vectors, there are {n}; use kind brute_force")
        score = self.score or ("dot_product" if unit else "squared_l2")
        inner = score == "dot_product"
        num_leaves = self.num_leaves or round((_LEAVES if inner else 1) * math.sqrt(n))
        if num_leaves > n // 2:
            raise UserError(f"num_leaves {num_leaves} is too many for {n} vectors; at most {n // 2}")
        return dataclasses.replace(
            self,
            kind=kind,
            score=score,
            num_leaves=num_leaves,
            leaves_to_search=self.leaves_to_search and min(self.leaves_to_search, num_leaves),
            reorder=self.reorder or 24,
            rescore=self.rescore or ("bfloat16" if inner else "float32"),
            dimensions_per_block=min(dimension, self.dimensions_per_block or max(2, -(-dimension // _MOST_CODES))),
            spill=float(inner) if self.spill is None else self.spill,
            leaf_eta=_LEAF_ETA * inner if self.leaf_eta is None else self.leaf_eta,
            training_sample=min(self.training_sample, n),
        )

    def check(self, *, unit: bool) -> None:
        """Refuses settings that no number of vectors would make possible.

        Raises:
          UserError: naming the setting.
        """
        for name, allowed in (("kind", KINDS), ("score", (None, *SCORES)), ("rescore", (None, *RESCORINGS))):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} {value!r} is not one of {', '.join(filter(None, allowed))}")
        for name in ("num_leaves", "leaves_to_search", "reorder", "dimensions_per_block", "training_sample"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, is {value}")
        if self.score == "dot_product" and not unit:
            raise UserError("score dot_product needs vectors of length 1: embed with --normalize, or use squared_l2")
        for name in ("spill", "leaf_eta"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} must not be negative, is {value}")
            if value and (self.score or ("dot_product" if unit else "squared_l2")) != "dot_product":
                raise UserError(f"{name} needs score dot_product, so vectors of length 1: embed with --normalize")

    def memory_bytes(self, dimension: int) -> float:
        """Bytes a vector takes in a server that has loaded a resolved index: codes, rescoring, leaf and chunk id."""
        if self.kind == "brute_force":
            return 4 * dimension + 8
        copies = 2 if self.spill else 1
        codes = math.ceil(dimension / self.dimensions_per_block) / 2
        return copies * (codes + 4) + dimension * (4 if self.rescore == "float32" else 2) + 8

    def disk_bytes(self, dimension: int) -> float:
        """Bytes a vector takes in the files of a resolved index."""
        if self.kind == "brute_force":
            return 4 * dimension + 8
        copies = 2 if self.spill else 1
        codes = math.ceil(dimension / self.dimensions_per_block)  # a byte each on disk
        return copies * (codes + 4) + dimension * (4 if self.rescore == "float32" else 2) + 8


def build_bytes(dimension: int) -> int:
    """Bytes a vector takes while a shard is built: our float32 array, ScaNN's copy, and its codes."""
    return 2 * 4 * dimension + dimension + 100


def shards_for(n: int, dimension: int, memory: float = BUILD_MEMORY) -> int:
    """How many shards n vectors make when building one may take `memory` bytes.

    Raises:
      UserError: the memory holds no shard worth its name.
    """
    largest = int(memory // build_bytes(dimension))
    if largest < BRUTE_FORCE_LIMIT:
        raise UserError(f"{memory:,.0f} bytes hold {largest:,} vectors of {dimension} components; give more")
    return max(1, math.ceil(n / largest))
