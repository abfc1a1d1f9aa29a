"""A RETRO that reads other neighbours: BM25's in the place of the dense retriever's, or the dense ones in its order.

(Doostmohammadi et al. 2023, arXiv 2305.16243.) Nothing is trained: the neighbours are exchanged at evaluation.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.losses import TokenLosses, collect
from retro_jax.evaluation.methods.method import MethodContext
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import scored_spans
from retro_jax.retrieval.bm25 import Bm25, Bm25Settings
from retro_jax.retrieval.neighbours import NeighbourTable, find_neighbours
from retro_jax.retrieval.reranking import rerank_neighbours


class Bm25Neighbours:
    """RETRO[ON] with the neighbours that BM25 finds in the database.

    Attributes:
      name, settings, inputs: of `Method`.
    """

    name = "bm25"
    for_retro = True
    needs_neighbours = False
    needs_tuning = False

    def __init__(self, context: MethodContext) -> None:
        if context.run.config.model.is_baseline:
            raise UserError(
                f"{context.run.workdir} is a baseline, which reads no neighbours; {self.name} is for a RETRO"
            )
        self._context = context
        self.settings: dict[str, Any] = {"k": context.k, "bm25": dataclasses.asdict(Bm25Settings())}
        self.inputs = context.database_inputs("database")

    def table(self, evaluated: Evaluated) -> NeighbourTable:
        """The neighbours of a set, found once and kept; filtered as those that it has."""
        context, directory = self._context, self._directory(evaluated)
        find_neighbours(
            evaluated.corpus,
            context.database,
            directory,
            k=context.k,
            filter=getattr(evaluated.neighbours, "filter", "none"),
            bm25=Bm25Settings(),
        )
        return NeighbourTable(directory)

    def losses(self, evaluated: Evaluated, asked: np.ndarray | None = None) -> TokenLosses:
        """Losses of the tokens of a set; see `Method`.

        Raises:
          UserError: no neighbours of the set to put into order; another tokenizer.
        """
        context, corpus = self._context, evaluated.corpus
        context.run.check_tokenizer(corpus.tokenizer_fingerprint, str(corpus.directory))
        neighbourhood = Neighbourhood(self.table(evaluated), context.database_corpus(), context.k)
        spans = scored_spans(
            context.plain if asked is None else context.with_best,
            corpus,
            **context.windows,
            neighbourhood=neighbourhood,
            description=f"{evaluated.name}: {self.name}",
        )
        return collect(corpus, spans)

    def _directory(self, evaluated: Evaluated) -> Path:
        return self._context.work / self.name / evaluated.corpus.fingerprint


class Bm25Reranked(Bm25Neighbours):
    """RETRO[ON] with those of its dense neighbours that score best by BM25."""

    name = "bm25_rerank"
    needs_neighbours = True

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self.settings["candidates"] = context.options.candidates

    def table(self, evaluated: Evaluated) -> NeighbourTable:
        context, directory = self._context, self._directory(evaluated)
        if not isinstance(evaluated.neighbours, NeighbourTable):
            raise UserError(f"{evaluated.name}: re-ranking needs the neighbours of its chunks; find them first")
        rerank_neighbours(
            evaluated.corpus,
            evaluated.neighbours,
            Bm25(context.database_corpus()),
            directory,
            k=context.k,
            depth=min(context.options.candidates, evaluated.neighbours.k),
        )
        return NeighbourTable(directory)
