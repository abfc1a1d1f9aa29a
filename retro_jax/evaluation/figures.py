"""All figures of one set of documents: what kept losses say, whole, by source, by overlap, and how they differ."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from retro_jax.data.stage import fingerprint
from retro_jax.data.text import read_lines
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import document_groups, document_scores
from retro_jax.evaluation.bootstrap import bits_per_byte_difference, rate_difference
from retro_jax.evaluation.completions import completion_scores, completion_tokens
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.leakage import (
    ALPHAS,
    NEIGHBOURS,
    class_scores,
    leakage_curve,
    leaked_shares,
    overlap_classes,
    run_classes,
)
from retro_jax.evaluation.losses import TokenLosses
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.overlap import runs_in_own_neighbours, runs_in_read_neighbours
from retro_jax.evaluation.wikitext import word_perplexity


@dataclasses.dataclass(frozen=True)
class Partition:
    """A way to take the tokens of a corpus apart.

    Attributes:
      names: of its classes, in order.
      classes: int [chunks, 1] or [chunks, M], the class of each chunk or token.
    """

    names: list[str]
    classes: np.ndarray


class Examined:
    """What is known of a set before anything is scored: partitions of its text, completions, words.

    Attributes:
      evaluated: the set.
      partitions: name to `Partition`: "source" of the document; "overlap", the longest run of tokens that a chunk has
        in common with what was read when it was predicted, as a share of the chunk; "run", the longest run that ends
        with the token and stands in what was read.
      leaked: float64 [chunks], r(C) with the 10 nearest neighbours; None without neighbours.
      completions: bool [chunks, M], tokens that are asked for; None where nothing is.
      words: of the original, for perplexity per word; None where unknown.
      digests: 16 hex digits of each partition by name, and under "leakage" of r(C), under "completions" of the tokens
        that are asked for: figures of parts can be compared where these are equal.
    """

    def __init__(self, directory: Path, evaluated: Evaluated, *, k: int) -> None:
        """Looks a set over.

        Args:
          directory: of the set, with documents.jsonl where documents say more than their text.
          evaluated: the set.
          k: neighbours that are read.
        """
        corpus = evaluated.corpus
        self.evaluated = evaluated
        sources = document_groups(corpus, "source")
        names = sorted(set(sources))
        documents = corpus.document_index(np.arange(corpus.num_chunks))
        numbers = np.array([names.index(source) for source in sources])
        self.partitions = {"source": Partition(names, numbers[documents][:, None])}
        self.leaked = None
        if evaluated.neighbours is not None:
            table, database = evaluated.neighbours, evaluated.database
            nearest = Neighbourhood(table, database, min(NEIGHBOURS, table.k))
            self.leaked = leaked_shares(corpus, runs_in_own_neighbours(corpus, nearest))
            runs = runs_in_read_neighbours(corpus, Neighbourhood(table, database, min(k, table.k)))
            names, classes = overlap_classes(leaked_shares(corpus, runs))
            self.partitions["overlap"] = Partition(names, classes[:, None])
            self.partitions["run"] = Partition(*run_classes(runs))
        path = directory / "documents.jsonl"
        rows = [_parsed(line, f"{path}:{number}") for number, line in _lines(path)]
        completions = {str(row["id"]): row["completion"] for row in rows if "completion" in row}
        self.completions = completion_tokens(corpus, completions) if completions else None
        counted = [row["words"] for row in rows if "words" in row]
        if counted and len(counted) != corpus.num_documents:
            raise UserError(
                f"{directory}: documents.jsonl counts the words of {len(counted)} documents, the corpus has "
                f"{corpus.num_documents}; build it from this file"
            )
        self.words = sum(counted) if counted else None
        found = {name: _digest(partition.classes, *partition.names) for name, partition in self.partitions.items()}
        found |= {} if self.leaked is None else {"leakage": _digest(self.leaked)}
        self.digests = found | ({} if self.completions is None else {"completions": _digest(self.completions)})

    def figures(self, losses: TokenLosses) -> dict[str, Any]:
        """All figures of one method, JSON-serialisable."""
        scores = document_scores(losses)
        found: dict[str, Any] = {**scores.total().as_json(), "settings": losses.settings, "digests": self.digests}
        found["parts"] = {
            name: class_scores(losses, partition.names, partition.classes)
            for name, partition in self.partitions.items()
        }
        if self.leaked is not None:
            found["leakage"] = [dataclasses.asdict(point) for point in leakage_curve(losses, self.leaked)]
        if self.words is not None:
            found["word_perplexity"] = word_perplexity(scores, self.words)
        if self.completions is not None:
            found["completions"] = {"natural": completion_scores(losses, self.completions).as_json()}
        return found

    def differences(self, first: TokenLosses, second: TokenLosses) -> list[dict[str, Any]]:
        """Bits per byte of the second less those of the first, with intervals: whole, for every part and alpha."""
        found = [{"part": "all", "name": "all", **bits_per_byte_gap(first, second)}]
        for part, partition in self.partitions.items():
            if len(partition.names) > 1:
                classes = np.broadcast_to(partition.classes, first.nats.shape)
                found += [
                    {"part": part, "name": name, **bits_per_byte_gap(first, second, classes == number)}
                    for number, name in enumerate(partition.names)
                ]
        if self.leaked is not None:
            for alpha in ALPHAS:
                kept = np.broadcast_to((self.leaked <= alpha)[:, None], first.nats.shape)
                found.append(
                    {"part": "leakage", "name": f"{100 * alpha:g} %", **bits_per_byte_gap(first, second, kept)}
                )
        if self.completions is not None:
            found += self.completion_differences(first, second, "natural")
        return [entry for entry in found if not math.isnan(entry["estimate"])]

    def completion_differences(self, first: TokenLosses, second: TokenLosses, alignment: str) -> list[dict[str, Any]]:
        """The same of the completions alone, and of their accuracy; `alignment` names where chunks begin."""
        difference = bits_per_byte_gap(first, second, self.completions)
        found = [{"part": f"completions, {alignment}", "name": "bits per byte", **difference}]
        ours, theirs = completion_scores(first, self.completions), completion_scores(second, self.completions)
        if ours.correct is not None and theirs.correct is not None:
            difference = rate_difference(ours.correct, theirs.correct, ours.keys).as_json()
            found.append({"part": f"completions, {alignment}", "name": "accuracy", **difference})
        return found


def bits_per_byte_gap(first: TokenLosses, second: TokenLosses, counted: np.ndarray | None = None) -> dict[str, Any]:
    """bpb of the second less that of the first with its interval, of all text or of the tokens of a mask."""
    return bits_per_byte_difference(document_scores(first, counted), document_scores(second, counted)).as_json()


def describe(examined: Examined) -> dict[str, Any]:
    """Size of a set, and how its text overlaps with the database."""
    corpus = examined.evaluated.corpus
    found = {
        "name": examined.evaluated.name,
        "documents": corpus.num_documents,
        "chunks": corpus.num_chunks,
        "bytes": corpus.num_bytes,
        "tokens": corpus.num_tokens - 2 * corpus.num_documents,
        "words": examined.words,
    }
    if examined.leaked is not None:
        found["mean_leaked_share"] = float(examined.leaked.mean())
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text of the lines of documents.jsonl; none when there is no such file."""
    if path.is_file():
        yield from ((number, line) for number, line in read_lines(path) if line.strip())


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object")
    for name, kind, what in (("completion", str, "a string"), ("words", int, "a whole number")):
        if name in row and not isinstance(row[name], kind):
            raise UserError(f'{place}: "{name}" is not {what}')
    if "completion" in row and not isinstance(row.get("id"), str | int):
        raise UserError(f'{place}: a "completion" without the "id" of its document; give the line the corpus\'s id')
    return row


def _digest(array: np.ndarray, *names: str) -> str:
    return fingerprint([hashlib.sha256(np.ascontiguousarray(array)).hexdigest(), list(array.shape), *names])
