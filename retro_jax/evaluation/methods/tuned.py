"""Methods with weights and temperatures that are tuned on other documents than those they are scored on."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.losses import TokenLosses
from retro_jax.evaluation.methods.activations import Predicted, predictions
from retro_jax.evaluation.methods.method import MethodContext, losses_by_document
from retro_jax.evaluation.methods.mixture import most_probable
from retro_jax.evaluation.passes import document_keys
from retro_jax.model.weights import compute_dtype

_PLACES_AT_ONCE = 256


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


@dataclasses.dataclass(frozen=True)
class Other:
    """The distribution that a method mixes with the model's in some places.

    Attributes:
      tokens: [n, S] int, those it knows; a repeated one adds up.
      logits: [n, S] float64, -inf for none.
      weight: lambda, one number or [n].
    """

    tokens: np.ndarray
    logits: np.ndarray
    weight: np.ndarray | float


class TunedMethod(abc.ABC):
    """A `Method` whose parameters are fitted to a tuning set, or, where that is scored itself, to its other half.

    Attributes:
      name, settings, inputs: of `Method`.
      context: what it was made from.
    """

    name: str
    for_retro = False
    needs_neighbours = False
    needs_tuning = False

    def __init__(self, context: MethodContext) -> None:
        """Prepares the method.

        Raises:
          UserError: it needs a tuning set, or the neighbours of one, and there is none.
        """
        tuning = context.tuning
        if self.needs_tuning and tuning is None:
            raise UserError(f"{self.name} is trained on a tuning set; give one")
        self.context = context
        self.settings: dict[str, Any] = {}
        self.inputs: dict[str, str] = {}
        if tuning is not None:
            self.inputs["tuning"] = tuning.corpus.fingerprint
            if self.needs_neighbours:
                if tuning.neighbours is None:
                    raise UserError(f"{tuning.name}: {self.name} is tuned with its neighbours; find them first")
                self.inputs["tuning_neighbours"] = tuning.neighbours.fingerprint

    @abc.abstractmethod
    def gather(self, evaluated: Evaluated) -> Evidence:
        """What is to be known of a set to give its tokens their losses with any parameters."""

    @abc.abstractmethod
    def fit(self, evidence: Evidence) -> dict[str, Any]:
        """The parameters with the least loss on these tokens, never more than the model's own."""

    @abc.abstractmethod
    def fixed(self, evidence: Evidence) -> dict[str, Any]:
        """Parameters without a tuning set, for a method that does not need one; no token that came is looked at."""

    @abc.abstractmethod
    def apply(self, parameters: dict[str, Any], evidence: Evidence) -> np.ndarray:
        """[n] float64, -ln p of every token."""

    def describe(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """What is worth reporting of parameters, JSON-serialisable."""
        return parameters

    def losses(self, evaluated: Evaluated, asked: np.ndarray | None = None) -> TokenLosses:
        """Losses of the tokens of a set; see `Method`.

        Raises:
          UserError: the set is the tuning set and has documents of one group only; what gathering raises.
        """
        corpus, tuning = evaluated.corpus, self.context.tuning
        self.context.run.check_tokenizer(corpus.tokenizer_fingerprint, str(corpus.directory))
        evidence = self.gather(evaluated)
        if tuning is None:
            tuned_on, fitted = "nothing", [self.fixed(evidence)]
        elif tuning.corpus.fingerprint == corpus.fingerprint:
            half = second_half(corpus).astype(np.int64)
            of_row = half[evidence.documents]
            tuned_on = f"the other half of {tuning.name}"
            fitted = [self.fit(evidence.of(of_row != side)) for side in (0, 1)]
        else:
            tuned_on, fitted = tuning.name, [self._tuned]
        if len(fitted) == 1:
            nats, parameters = self.apply(fitted[0], evidence), fitted * corpus.num_documents
        else:
            nats, parameters = np.empty(len(of_row), np.float64), [fitted[side] for side in half]
            for side, own in enumerate(fitted):
                nats[of_row == side] = self.apply(own, evidence.of(of_row == side))
        settings = {"tuned_on": tuned_on, "parameters": [self.describe(one) for one in fitted]}
        best = None if asked is None else self.best(evaluated, evidence, asked, parameters)
        return losses_by_document(corpus, evidence.documents, nats, settings, best)

    def best(
        self, evaluated: Evaluated, evidence: Evidence, asked: np.ndarray, parameters: Sequence[dict[str, Any]]
    ) -> np.ndarray | None:
        """The most probable token in the place of each asked one; None where the method cannot tell.

        Args:
          evaluated, evidence: the set, and what is known of its n tokens of text.
          asked: bool [chunks, M].
          parameters: of every document.

        Returns:
          [n] int32, -1 for those not asked.
        """
        return None

    @functools.cached_property
    def _tuned(self) -> dict[str, Any]:
        return self.fit(self.gather(self.context.tuning))


class Mixture(TunedMethod):
    """A method that mixes a distribution of its own with the model's, so that it knows the most probable token."""

    @abc.abstractmethod
    def other(self, parameters: dict[str, Any], evidence: Evidence, text: Predicted, places: np.ndarray) -> Other:
        """What is mixed with the model's distribution in some places of a document.

        Args:
          parameters: as for `apply`.
          evidence: of the whole document.
          text: of it, with states.
          places: [n] int, ascending, which of its tokens.
        """

    def best(
        self, evaluated: Evaluated, evidence: Evidence, asked: np.ndarray, parameters: Sequence[dict[str, Any]]
    ) -> np.ndarray:
        """As `TunedMethod.best`; every token of the vocabulary is looked at."""
        context, run, corpus = self.context, self.context.run, evaluated.corpus
        wanted = asked[corpus.tokenizer.is_text(corpus.tokens(np.arange(corpus.num_chunks)))]
        kernel = run.plan.merge(run.params).head_kernel().astype(compute_dtype(run.config.model))
        kernel = np.asarray(kernel, np.float32)
        best = np.full(len(wanted), -1, np.int32)
        bounds = np.searchsorted(evidence.documents, np.arange(corpus.num_documents + 1))
        texts = predictions(
            context.with_states,
            corpus,
            **context.windows,
            documents=np.unique(evidence.documents[wanted]).tolist(),
            description=f"{evaluated.name}: {self.name}, completions",
        )
        for text in texts:
            rows = slice(*bounds[text.document : text.document + 2])
            places = np.flatnonzero(wanted[rows])
            for some in np.split(places, range(_PLACES_AT_ONCE, len(places), _PLACES_AT_ONCE)):
                other = self.other(parameters[text.document], evidence.of(rows), text, some)
                own = text.states[some] @ kernel.T
                best[rows.start + some] = most_probable(own, other.tokens, other.logits, other.weight)
        return best


def second_half(corpus: Corpus) -> np.ndarray:
    """bool [documents]: one half of the document groups of a corpus, by their keys; groups are never cut.

    Raises:
      UserError: there is only one group.
    """
    groups, of_document = np.unique(document_keys(corpus), return_inverse=True)
    if len(groups) < 2:
        raise UserError(f"{corpus.directory}: tuning on one half of the documents needs two groups; give another set")
    return of_document % 2 == 1
