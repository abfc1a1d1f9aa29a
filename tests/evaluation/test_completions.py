"""The ends of texts are found by their bytes, scored alone, and the same wherever chunks begin without retrieval."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import MODEL, M

from retro_jax.config import MeshConfig
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.completions import completion_scores, completion_tokens, padded_losses
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import TokenLosses, collect
from retro_jax.evaluation.passes import scored_spans
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.retrieval.database import Neighbours
from retro_jax.training.state import plan_model

WINDOW = 16 * M
TEXTS = {
    "a": ("the quick brown fox jumps over the lazy dog and then it rests", " rests"),
    "b": ("what is the answer to all of this? nobody knows: 42", "42"),
    "c": ("a text from which nothing is asked", ""),
    "d": ("another one that is so much longer than a chunk that its end lies in the third one at least, yes", "yes"),
}


@pytest.fixture(scope="module")
def corpus(small_data, tmp_path_factory):
    root = tmp_path_factory.mktemp("completions")
    rows = [{"id": name, "text": text} for name, (text, _) in TEXTS.items()]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus([root / "a.jsonl"], Corpus(small_data.corpus).tokenizer, root / "corpus", chunk_length=M)
    return Corpus(root / "corpus")


@pytest.fixture(scope="module")
def marked(corpus):
    return completion_tokens(corpus, {name: completion for name, (_, completion) in TEXTS.items()})


@pytest.fixture(scope="module")
def forward():
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    plan = plan_model(MODEL, mesh)
    _, params = nnx.split(Retro(MODEL, rngs=nnx.Rngs(3)))
    return Forward(plan, jax.tree.map(lambda leaf: leaf * 8.0, params), mesh, batch_size=2, best=True)


@pytest.fixture(scope="module")
def natural(forward, corpus):
    return collect(corpus, scored_spans(forward, corpus, window=WINDOW, stride=WINDOW))


def test_marked_tokens_are_the_completions(corpus, marked):
    for number, (_, completion) in enumerate(TEXTS.values()):
        first, chunks = corpus.document_range(number)
        rows = slice(first, first + chunks)
        asked = corpus.tokens(np.arange(first, first + chunks))[marked[rows]]
        assert corpus.tokenizer.decode(asked).strip() == completion.strip()


def test_only_completions_count_and_the_most_probable_token_is_right(corpus, marked, natural):
    scores = completion_scores(natural, marked)
    assert len(scores.nats) == 3 and scores.nats.sum() == pytest.approx(float(natural.nats[marked].sum()))
    tokens = corpus.tokens(np.arange(corpus.num_chunks))
    found = TokenLosses(corpus, natural.nats, np.where(marked, tokens, -1))
    assert completion_scores(found, marked).correct.all()
    wrong = found.best.copy()
    wrong[tuple(np.argwhere(marked)[-1])] += 1
    scores = completion_scores(TokenLosses(corpus, natural.nats, wrong), marked)
    assert scores.correct.tolist() == [True, True, False]
    assert scores.as_json()["accuracy"] == pytest.approx(2 / 3)
    assert completion_scores(TokenLosses(corpus, natural.nats), marked).as_json()["accuracy"] is None


def test_without_retrieval_padding_on_the_left_changes_nothing(forward, corpus, marked, natural):
    padded = padded_losses(forward, corpus, marked, window=WINDOW)
    assert (padded.nats[~marked] == 0).all()
    np.testing.assert_allclose(padded.nats[marked], natural.nats[marked], rtol=2e-5)
    assert (padded.best[marked] == natural.best[marked]).all()


class Retrieves:
    """A database that answers every chunk with the chunk itself, and remembers what it was asked."""

    def retrieve(self, chunks, k):
        self.asked = chunks
        tokens = np.repeat(np.concatenate([chunks, chunks], axis=1)[:, None], k, axis=1)
        return Neighbours(np.zeros((len(chunks), k)), np.zeros((len(chunks), k)), tokens)


def test_a_padded_context_ends_with_the_chunk_that_retrieves(forward, corpus, marked):
    database = Retrieves()
    found = padded_losses(forward, corpus, marked, window=WINDOW, database=database, k=2)
    texts = [corpus.tokenizer.decode(chunk) for chunk in database.asked]
    for text, completion in TEXTS.values():
        if completion:
            context = text.removesuffix(completion.strip()).rstrip()
            assert any(context.endswith(one.rstrip()) and one for one in texts)
    off = padded_losses(forward, corpus, marked, window=WINDOW)
    assert not np.allclose(found.nats[marked], off.nats[marked], rtol=1e-3)


def test_what_does_not_belong_is_named(corpus, forward):
    with pytest.raises(UserError, match="document 'a' does not end with its completion 'slept'"):
        completion_tokens(corpus, {"a": "slept"})
    with pytest.raises(UserError, match="no document has a completion"):
        completion_tokens(corpus, {})
    long = completion_tokens(corpus, {"d": TEXTS["d"][0][20:]})
    with pytest.raises(UserError, match="longer than a chunk of 8"):
        padded_losses(forward, corpus, long, window=WINDOW)
