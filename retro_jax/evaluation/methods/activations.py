"""What a trained model computes on the way to each prediction: the keys of kNN-LM and the states of the cache."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from retro_jax.data.corpus import Corpus
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.passes import scored_spans
from retro_jax.training.state import ModelPlan


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The text of one document, each token with what it costs the model.

    Attributes:
      document: index in the corpus.
      labels: [n] int32, the tokens after the start token, without the end token.
      nats: [n] float32.
      states: [n, D] float32, what the output head read to predict each; None unless asked for.
    """

    document: int
    labels: np.ndarray
    nats: np.ndarray
    states: np.ndarray | None


def predictions(
    forward: Forward,
    corpus: Corpus,
    *,
    window: int,
    stride: int,
    documents: Sequence[int] | None = None,
    with_end: bool = False,
    description: str = "evaluating",
) -> Iterator[Predicted]:
    """The documents of a corpus in order, scored in windows as `scored_spans` does.

    Args:
      forward, corpus, window, stride, documents, description: see there.
      with_end: the end tokens are among the labels.
    """
    spans: list[Any] = []
    for span in scored_spans(
        forward, corpus, window=window, stride=stride, documents=documents, description=description
    ):
        if spans and spans[-1].document != span.document:
            yield _joined(spans, with_end)
            spans = []
        spans.append(span)
    if spans:
        yield _joined(spans, with_end)


def key_params(plan: ModelPlan, params: nnx.State) -> nnx.State:
    """Parameters with which a model's output head reads the keys of kNN-LM: the normalised input of the last FFW.

    (Khandelwal et al. 2020, section 3 and figure 4, whose best key it is; the paper does not say which layer it takes.)
    They are the model's own with the last feed-forward layer's contribution set to zero and the final norm's scale
    replaced by that layer's own: what is left before the final norm is then what that layer would have read. So one
    program gives predictions and keys, for a baseline and for a RETRO, on every mesh.
    """

    def changed(params: nnx.State) -> nnx.State:
        model = plan.merge(params)
        decoder = model.decoder
        segments = [*decoder.before, *decoder.after]
        if decoder.entry is not None and not decoder.after:
            feed_forward, last = decoder.entry.ffw, ...
        else:
            feed_forward, last = segments[-1].blocks[-1].ffw, -1  # stacked over the repeats of the segment
        decoder.norm.scale[...] = feed_forward.norm.scale[...][last]
        feed_forward.down[...] = feed_forward.down[...].at[last].set(0)
        return nnx.split(model)[1]

    return jax.jit(changed, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, plan.params))(params)


def _joined(spans: Sequence[Any], with_end: bool) -> Predicted:
    labels, nats = (np.concatenate([getattr(span, name) for span in spans]) for name in ("labels", "nats"))
    states = None if spans[0].hidden is None else np.concatenate([span.hidden for span in spans])
    count = len(labels) - int(not with_end)  # a document's last token is its end token
    return Predicted(spans[0].document, labels[:count], nats[:count], states if states is None else states[:count])
