"""The methods that the paper's table 3 compares RETRO with, on one model, one database and the same tokens.

| name | needs | what predicts a token |
| --- | --- | --- |
| `knn_lm` | a baseline | the model mixed with what followed the nearest contexts of the database |
| `spalm` | a baseline, a tuning set | the same with a gate, trained, in the place of one weight |
| `cache` | a baseline | the model mixed with what followed like states of the same document |
| `prepend` | a baseline, neighbours | the model with the neighbours' text before the document |
| `rag` | a baseline, neighbours | the same one neighbour at a time, mixed |
| `bm25` | a RETRO | RETRO[ON] with neighbours found by BM25 |
| `bm25_rerank` | a RETRO, neighbours | RETRO[ON] with its neighbours in BM25's order |
"""

from collections.abc import Callable, Iterable

from retro_jax.config import did_you_mean
from retro_jax.errors import UserError
from retro_jax.evaluation.methods.cache import ContinuousCache
from retro_jax.evaluation.methods.gate import Spalm
from retro_jax.evaluation.methods.knn_lm import KnnLm
from retro_jax.evaluation.methods.lexical import Bm25Neighbours, Bm25Reranked
from retro_jax.evaluation.methods.method import SEARCHES, Method, MethodContext, MethodOptions
from retro_jax.evaluation.methods.reading import Prepend, Rag

METHODS: dict[str, Callable[[MethodContext], Method]] = {
    kind.name: kind for kind in (KnnLm, Spalm, ContinuousCache, Prepend, Rag, Bm25Neighbours, Bm25Reranked)
}


def check_methods(names: Iterable[str]) -> None:
    """Raises UserError for a name that is no method."""
    for name in names:
        if name not in METHODS:
            raise UserError(f"{name!r} is no comparison method{did_you_mean(name, METHODS)}")


__all__ = ["METHODS", "SEARCHES", "Method", "MethodContext", "MethodOptions", "check_methods"]
