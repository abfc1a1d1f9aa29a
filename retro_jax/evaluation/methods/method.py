"""What a comparison method is: something that gives every token of a corpus a loss, as a model by itself does."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax import nnx

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import LossCollector, TokenLosses
from retro_jax.evaluation.methods.activations import key_params
from retro_jax.retrieval.segments import DatabaseCorpus
from retro_jax.training.trained import TrainedRun

SEARCHES = ("auto", "exact", "brute_force", "tree")


class Method(Protocol):
    """A comparison method, made for one run and one database.

    Attributes:
      name: as on the command line.
      settings: everything beside the inputs that the losses depend on, JSON-serialisable.
      inputs: fingerprints of what they are made from, beside the run and the evaluated corpus.
      for_retro: whether it runs on a RETRO, else on a baseline.
      needs_neighbours: whether it cannot do without the neighbours of the set.
      needs_tuning: whether it cannot do without a tuning set.
    """

    name: str
    for_retro: bool
    needs_neighbours: bool
    needs_tuning: bool
    settings: dict[str, Any]
    inputs: dict[str, str]

    def losses(self, evaluated: Evaluated, asked: np.ndarray | None = None) -> TokenLosses:
        """Losses of the tokens that the model itself is scored on; their settings say what was tuned.

        Args:
          evaluated: the set.
          asked: bool [chunks, M], tokens in whose place the most probable one is to be known too. A method that cannot
            tell gives losses without `best`.
        """


@dataclasses.dataclass(frozen=True)
class MethodOptions:
    """What a person may choose.

    Attributes:
      neighbours: k of kNN-LM and of the gate; 10 in the paper (section 4.1), 1024 in Khandelwal et al. 2020.
      datastore_share: of the database's documents that the datastore is made of, evenly spread; in (0, 1].
      datastore_search: "exact" in NumPy, ScaNN's "brute_force", exact as well and much quicker, or its "tree"; "auto"
        is the first up to 20,000 keys, the second up to a million.
      cache_size: tokens of the same document that the cache remembers.
      prepended: neighbours read in the context; the nearest stands last.
      prepend_stride: chunks that are scored with the same prepended neighbours, those of the chunk before them.
      candidates: neighbours that BM25 re-ranks.
    """

    neighbours: int = 10
    datastore_share: float = 1.0
    datastore_search: str = "auto"
    cache_size: int = 1024
    prepended: int = 2
    prepend_stride: int = 1
    candidates: int = 100

    def __post_init__(self) -> None:
        for name in ("neighbours", "cache_size", "prepended", "prepend_stride", "candidates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, is {getattr(self, name)}")
        if not 0 < self.datastore_share <= 1:
            raise UserError(f"datastore_share lies in (0, 1], not {self.datastore_share}")
        if self.datastore_search not in SEARCHES:
            raise UserError(f"datastore_search {self.datastore_search!r} is none of {', '.join(SEARCHES)}")


@dataclasses.dataclass(frozen=True)
class MethodContext:
    """What methods are made from.

    Attributes:
      run: the model: a baseline, or for BM25 in place of the dense retriever a RETRO.
      window, stride: of the evaluation, in tokens.
      batch_size: rows at a time; does not change the losses.
      k: neighbours that a RETRO reads.
      database: directory of the database.
      work: where methods keep what they compute, one directory for each run.
      tuning: what weights and temperatures are tuned on; None: fixed ones where there are such.
      options: see `MethodOptions`.
    """

    run: TrainedRun
    window: int
    stride: int
    batch_size: int
    k: int
    database: Path
    work: Path
    tuning: Evaluated | None = None
    options: MethodOptions = MethodOptions()

    @property
    def windows(self) -> dict[str, int]:
        """window and stride, as `scored_spans` takes them."""
        return {"window": self.window, "stride": self.stride}

    @functools.cached_property
    def plain(self) -> Forward:
        """The run's model, for losses alone: exactly the baseline's."""
        return self._forward(self.run.params)

    @functools.cached_property
    def with_best(self) -> Forward:
        """The run's model, with the most probable tokens."""
        return self._forward(self.run.params, best=True)

    @functools.cached_property
    def with_states(self) -> Forward:
        """The run's model, with what its output head reads."""
        return self._forward(self.run.params, hidden=True)

    @functools.cached_property
    def with_keys(self) -> Forward:
        """The keys of kNN-LM as hidden states; its losses mean nothing."""
        return self._forward(key_params(self.run.plan, self.run.params), hidden=True)

    def _forward(self, params: nnx.State, **outputs: bool) -> Forward:
        run = self.run
        return Forward(
            run.plan, params, run.mesh, batch_size=self.batch_size, vocab_block=run.config.vocab_block, **outputs
        )

    def database_corpus(self) -> DatabaseCorpus:
        """The chunks of the database, made with the run's tokenizer.

        Raises:
          UserError: with another one.
        """
        corpus = DatabaseCorpus(self.database)
        self.run.check_tokenizer(corpus.tokenizer_fingerprint, str(self.database))
        return corpus

    def database_inputs(self, name: str) -> dict[str, str]:
        """Fingerprints of the chunks of the database, under a name, and of which of them have been removed."""
        corpus = self.database_corpus()
        removed = corpus.segments.removed_sha256
        return {name: corpus.fingerprint} | ({"removed": removed} if removed else {})


def losses_by_document(
    corpus: Corpus,
    documents: Sequence[int] | np.ndarray,
    nats: np.ndarray,
    settings: dict[str, Any],
    best: np.ndarray | None = None,
) -> TokenLosses:
    """Losses from one flat array.

    Args:
      corpus: what was scored.
      documents: [n], ascending: the document of each token. All its tokens but the first are there, in order; the end
        token may be missing.
      nats: [n] their losses.
      settings: what the losses say of themselves.
      best: [n] int32, the most probable token in the place of each; None where it is unknown.
    """
    collector = LossCollector(corpus, best=best is not None, dtype=nats.dtype)
    bounds = np.searchsorted(documents, np.arange(corpus.num_documents + 1))
    for document, (first, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        collector.add(document, 1, nats[first:stop], None if best is None else best[first:stop])
    return collector.finish(settings)
