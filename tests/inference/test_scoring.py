"""Scoring gives every token's log-probability, ON, OFF, and with neighbours of the caller's choice."""

import dataclasses

import jax
import numpy as np
import pytest
from answers import Recorder
from flax import nnx
from small_run import MODEL, K, M

from retro_jax.config import MeshConfig
from retro_jax.data.tokenizer import BOS_ID
from retro_jax.errors import UserError
from retro_jax.inference.scoring import Scorer
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model


@pytest.fixture(scope="module")
def model():
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    _, params = nnx.split(Retro(MODEL, rngs=nnx.Rngs(5)))
    return plan_model(MODEL, mesh), jax.tree.map(lambda leaf: leaf * 3, params)


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(MODEL, *model, retriever=Recorder(), neighbours=K, max_context=8 * M)


def text(length):
    return np.random.default_rng(length).integers(4, MODEL.vocab_size, length).tolist()


def log_probabilities(model, tokens, near):
    plan, params = model
    tokens = np.asarray([[BOS_ID, *tokens]], np.int32)
    logits = np.asarray(jax.jit(plan.merge(params))(tokens, near)[0, :-1], np.float64)
    return np.take_along_axis(logits, tokens[0, 1:, None], 1)[:, 0] - np.log(np.exp(logits).sum(-1))


def test_on_and_off_are_the_full_forward_pass(model, scorer):
    tokens = text(3 * M + 2)
    chunks = np.asarray([BOS_ID, *tokens])[: 3 * M].reshape(3, M)
    near = np.stack([Recorder.neighbours(chunk, K) for chunk in chunks])[None]
    on, off = scorer.score(tokens), scorer.score(tokens, retrieve=False)
    np.testing.assert_allclose(on.log_probabilities, log_probabilities(model, tokens, near), atol=1e-5)
    np.testing.assert_allclose(off.log_probabilities, log_probabilities(model, tokens, None), atol=1e-5)
    assert [chunk.end for chunk in on.retrieved] == [M, 2 * M, 3 * M] and off.retrieved == ()


def test_other_neighbours_change_only_what_comes_after_their_chunk(scorer):
    tokens = text(4 * M)
    usual = scorer.score(tokens)
    dropped = scorer.score(tokens, given={1: []})
    changed = usual.log_probabilities != dropped.log_probabilities
    # Token 2M is the first that is predicted with the neighbours of chunk 1; the start token is not scored.
    assert not changed[: 2 * M - 1].any() and changed[2 * M - 1 : 3 * M - 1].all()
    same = scorer.score(tokens, given={chunk.chunk: chunk.tokens for chunk in usual.retrieved})
    np.testing.assert_array_equal(same.log_probabilities, usual.log_probabilities)


def test_a_text_longer_than_the_context_is_scored_whole(model, scorer):
    tokens = text(8 * M + 3 * M)
    short = Scorer(MODEL, *model, retriever=Recorder(), neighbours=K, max_context=8 * M)
    found = short.score(tokens).log_probabilities
    assert np.isfinite(found).all() and (found < 0).all() and len(found) == len(tokens)
    np.testing.assert_allclose(found[: 6 * M], scorer.score(tokens[: 7 * M]).log_probabilities[: 6 * M], atol=1e-5)
    assert scorer.score([]).log_probabilities.shape == (0,)


def test_a_baseline_takes_no_neighbours(model):
    baseline = dataclasses.replace(MODEL, cca_layers=())
    scorer = Scorer(baseline, *model, retriever=Recorder())
    with pytest.raises(UserError, match="takes no neighbours"):
        scorer.score(text(M))
