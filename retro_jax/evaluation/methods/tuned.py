"""Methods with weights and temperatures that are tuned on other documents than those they are scored on."""

import abc
import dataclasses
import functools
from typing import Any

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.losses import TokenLosses
from retro_jax.evaluation.methods.method import MethodContext, losses_by_document


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that a method looks at to give the tokens of a corpus their losses, one row a token in order of the text.

    Attributes:
      documents: [n] int64, index of each token's document, ascending.
      nats: [n], what each token costs the model alone.
      arrays: by name, [n, ...].
    """

    documents: np.ndarray
    nats: np.ndarray
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def of(self, rows: np.ndarray | slice) -> "Evidence":
        """Some of the rows, by a mask [n] or a slice."""
        return Evidence(
            self.documents[rows], self.nats[rows], {name: array[rows] for name, array in self.arrays.items()}
        )


class TunedMethod(abc.ABC):
    """A `Method` whose parameters are fitted to a tuning set, or, where that is scored itself, to its other half.

    Attributes:
      name, settings, inputs: of `Method`.
      context: what it was made from.
    """

    name: str
    for_retro = False
    needs_neighbours = False

    def __init__(self, context: MethodContext) -> None:
        self.context = context
        self.settings: dict[str, Any] = {}
        self.inputs: dict[str, str] = {}
        if context.tuning is not None:
            self.inputs["tuning"] = context.tuning.corpus.fingerprint
            if self.needs_neighbours and context.tuning.neighbours is not None:
                self.inputs["tuning_neighbours"] = context.tuning.neighbours.fingerprint

    @abc.abstractmethod
    def gather(self, evaluated: Evaluated) -> Evidence:
        """What is to be known of a set to give its tokens their losses with any parameters."""

    @abc.abstractmethod
    def fit(self, evidence: Evidence) -> dict[str, Any]:
        """The parameters with the least loss on these tokens, never more than the model's own."""

    @abc.abstractmethod
    def fixed(self) -> dict[str, Any]:
        """Parameters without a tuning set.

        Raises:
          UserError: the method has none.
        """

    @abc.abstractmethod
    def apply(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray:
        """[n] float64, -ln p of every token."""

    def describe(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """What is worth reporting of parameters, JSON-serialisable."""
        return parameters

    def losses(self, evaluated: Evaluated) -> TokenLosses:
        """Losses of the tokens of a set.

        Raises:
          UserError: the set is the tuning set and has documents of one group only; what gathering raises.
        """
        corpus, tuning = evaluated.corpus, self.context.tuning
        self.context.run.check_tokenizer(corpus.tokenizer_fingerprint, str(corpus.directory))
        evidence = self.gather(evaluated)
        if tuning is None:
            tuned_on, parts = "nothing", [(slice(None), self.fixed())]
        elif tuning.corpus.fingerprint == corpus.fingerprint:
            second = second_half(corpus)[evidence.documents]
            tuned_on = f"the other half of {tuning.name}"
            parts = [(second == side, self.fit(evidence.of(second != side))) for side in (False, True)]
        else:
            tuned_on, parts = tuning.name, [(slice(None), self._tuned)]
        nats = np.empty(len(evidence.nats), np.float64)
        for rows, parameters in parts:
            nats[rows] = self.apply(parameters, evidence.of(rows))
        described = [self.describe(parameters) for _, parameters in parts]
        return losses_by_document(corpus, evidence.documents, nats, {"tuned_on": tuned_on, "parameters": described})

    @functools.cached_property
    def _tuned(self) -> dict[str, Any]:
        return self.fit(self.gather(self.context.tuning))


def second_half(corpus: Corpus) -> np.ndarray:
    """bool [documents]: one half of the document groups of a corpus, by their keys; groups are never cut.

    Raises:
      UserError: there is only one group.
    """
    firsts = np.concatenate([first for first, _ in corpus.document_ranges()])
    groups, of_document = np.unique(corpus.document_keys(firsts), return_inverse=True)
    if len(groups) < 2:
        raise UserError(f"{corpus.directory}: tuning on one half of the documents needs two groups; give another set")
    return of_document % 2 == 1
