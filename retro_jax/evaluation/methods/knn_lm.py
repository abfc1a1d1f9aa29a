"""kNN-LM: what followed the nearest contexts of the database, mixed with the language model (paper appendix C.2)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.corpus import Corpus
from retro_jax.data.stage import Stage, shard_name
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.methods.activations import Predicted, predictions
from retro_jax.evaluation.methods.datastore import Datastore, build_datastore
from retro_jax.evaluation.methods.method import MethodContext
from retro_jax.evaluation.methods.mixture import best_mixture, mix, neighbour_log_probability, neighbour_logits
from retro_jax.evaluation.methods.tuned import Evidence, Mixture, Other

# The paper's weight; its temperature belongs to its own embeddings.
_WEIGHT = 0.118
# Sharpness times the mean distance of the nearest key.
_SHARPNESS = tuple(2.0**power for power in range(-6, 9))
_DOCUMENTS_A_SHARD = 256
_QUERIES_AT_ONCE = 4096


class KnnLm(Mixture):
    """p = lambda p_kNN + (1 - lambda) p_LM with one lambda and one temperature for all tokens."""

    name = "knn_lm"

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        options = context.options
        self.settings |= {
            "neighbours": options.neighbours,
            "datastore_share": options.datastore_share,
            "datastore_search": options.datastore_search,
        }
        self.inputs |= context.database_inputs("datastore")
        self._datastore: Datastore | None = None

    def gather(self, evaluated: Evaluated) -> Evidence:
        rows = self.nearest(evaluated.corpus)
        documents, labels, nats = predicted_text(self.context, evaluated)
        return Evidence(documents, nats, {"distances": rows["distances"], "values": rows["values"], "labels": labels})

    def fit(self, evidence: Evidence) -> dict[str, Any]:
        scale = _scale(evidence["distances"])
        candidates = ((factor / scale, self._log_knn(evidence, factor / scale)) for factor in _SHARPNESS)
        sharpness, weight = best_mixture(evidence.nats, candidates)
        return {"weight": weight, "sharpness": sharpness}

    def fixed(self, evidence: Evidence) -> dict[str, Any]:
        return {"weight": _WEIGHT, "sharpness": 1 / _scale(evidence["distances"])}

    def apply(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray:
        found = self._log_knn(evidence, parameters["sharpness"])
        return mix(evidence.nats, found, self.weight(parameters, evidence))

    def weight(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray | float:
        """lambda of every token [n], or one for all."""
        return parameters["weight"]

    def other(self, parameters: dict[str, Any], evidence: Evidence, text: Predicted, places: np.ndarray) -> Other:
        some = evidence.of(places)
        logits = neighbour_logits(some["distances"], parameters["sharpness"])
        return Other(some["values"], logits, self.weight(parameters, some))

    def nearest(self, corpus: Corpus) -> np.ndarray:
        """distances float32 [n, k] and values int32 [n, k] of the nearest keys of every text token of a corpus.

        They are searched once and kept, beside the datastore, for all methods that ask for them.
        """
        context, k = self.context, self.context.options.neighbours
        if self._datastore is None:
            self._datastore = build_datastore(context, context.work / "datastore")
        row = np.dtype([("distances", "<f4", (k,)), ("values", "<i4", (k,))])
        directory = context.work / "nearest" / corpus.fingerprint
        inputs = {"corpus": corpus.fingerprint, "datastore": self._datastore.fingerprint}
        parts = np.array_split(np.arange(corpus.num_documents), -(-corpus.num_documents // _DOCUMENTS_A_SHARD))
        with Stage(directory, "nearest", settings={"k": k, **context.windows}, inputs=inputs) as stage:
            if not stage.complete:
                for i, documents in enumerate(parts):
                    name = shard_name("nearest", i, len(parts), ".npy")
                    if stage.has(name):
                        continue
                    with stage.shard(name) as (path, counts), ArrayWriter(path, row) as writer:
                        found = predictions(
                            context.with_keys,
                            corpus,
                            **context.windows,
                            documents=documents.tolist(),
                            description=f"nearest contexts, part {i + 1} of {len(parts)}",
                        )
                        for queries in _together(one.states for one in found):
                            rows = np.empty(len(queries), row)
                            rows["distances"], rows["values"] = self._datastore.search(queries, k)
                            writer.append(rows)
                        counts["tokens"] = writer.rows
                stage.finish({"tokens": sum(stage.counts(name)["tokens"] for name in _names(len(parts)))})
        return np.concatenate([np.load(Path(directory) / name, mmap_mode="r") for name in _names(len(parts))])

    def _log_knn(self, evidence: Evidence, sharpness: float) -> np.ndarray:
        matches = evidence["values"] == evidence["labels"][:, None]
        return neighbour_log_probability(evidence["distances"], matches, sharpness)


def predicted_text(context: MethodContext, evaluated: Evaluated) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(documents, labels, nats), each [n]: the text tokens of a set and what they cost the run's model alone."""
    found = list(predictions(context.plain, evaluated.corpus, **context.windows, description=evaluated.name))
    documents = np.repeat([one.document for one in found], [len(one.labels) for one in found])
    return documents, np.concatenate([one.labels for one in found]), np.concatenate([one.nats for one in found])


def _scale(distances: np.ndarray) -> float:
    """Mean distance of the nearest key; 1 where all are copies."""
    nearest = distances[:, 0]
    return float(nearest[np.isfinite(nearest)].mean(dtype=np.float64)) or 1.0


def _together(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows of arrays, in arrays of `_QUERIES_AT_ONCE` and more but for the last; none is empty."""
    held: list[np.ndarray] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= _QUERIES_AT_ONCE:
            yield np.concatenate(held)
            held = []
    if any(map(len, held)):
        yield np.concatenate(held)


def _names(count: int) -> list[str]:
    return [shard_name("nearest", i, count, ".npy") for i in range(count)]
