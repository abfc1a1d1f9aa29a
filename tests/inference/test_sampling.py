"""Sampling retrieves at each chunk boundary and equals the full forward pass at every position."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import MODEL, K, M

from retro_jax.config import MeshConfig, RetroConfig
from retro_jax.data.tokenizer import BOS_ID, UNK_ID
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import Sampler
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model


@dataclasses.dataclass
class Answer:
    ids: np.ndarray
    distances: np.ndarray
    tokens: np.ndarray


class Recorder:
    """Neighbours that are a function of the chunk, and a record of what was asked."""

    def __init__(self):
        self.asked = []

    def retrieve(self, chunk_tokens, k):
        self.asked += [tuple(chunk) for chunk in chunk_tokens]
        tokens = np.stack([self.neighbours(chunk, k) for chunk in chunk_tokens])
        ids = chunk_tokens[:, :k].astype(np.int64)
        return Answer(ids, ids.astype(np.float32), tokens)

    @staticmethod
    def neighbours(chunk, k):
        rng = np.random.default_rng(int(chunk.sum()))
        return rng.integers(4, MODEL.vocab_size, (k, 2 * M)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    _, params = nnx.split(Retro(MODEL, rngs=nnx.Rngs(5)))
    return plan_model(MODEL, mesh), jax.tree.map(lambda leaf: leaf * 6, params)


@pytest.fixture(scope="module")
def sampled(model):
    """(retriever, {prompt length: (prompt, result)}) of greedy samples across two chunk boundaries."""
    retriever = Recorder()
    sampler = Sampler(MODEL, *model, vocab_size=MODEL.vocab_size, retriever=retriever, neighbours=K, max_context=8 * M)
    results = {}
    for length in (1, M - 2, M - 1, M, 2 * M - 1):
        prompt = np.random.default_rng(length).integers(4, MODEL.vocab_size, length).tolist()
        results[length] = (
            prompt,
            list(
                sampler.generate(prompt, max_new_tokens=2 * M + 2, decoding=Decoding(temperature=0), stop_at_end=False)
            ),
        )
    return retriever, results


def test_every_token_is_the_one_of_the_full_forward_pass(model, sampled):
    plan, params = model
    forward = jax.jit(lambda params, tokens, neighbours: plan.merge(params)(tokens, neighbours))
    for prompt, result in sampled[1].values():
        tokens = [BOS_ID, *prompt, *(entry.token for entry in result)]
        chunks = len(tokens) // M
        near = np.stack([Recorder.neighbours(np.asarray(tokens[c * M : (c + 1) * M]), K) for c in range(chunks)])
        logits = np.array(forward(params, np.asarray([tokens], np.int32), near[None].astype(np.int32))[0], np.float64)
        logits[:, [0, BOS_ID, UNK_ID]] = -np.inf
        for i, entry in enumerate(result):
            row = logits[len(prompt) + i]
            assert entry.token == row.argmax()
            assert entry.log_probability == pytest.approx(row.max() - np.log(np.exp(row).sum()), abs=1e-4)


def test_each_complete_chunk_is_retrieved_once_and_in_order(sampled):
    retriever, results = sampled
    expected = []
    for prompt, result in results.values():
        tokens = [BOS_ID, *prompt, *(entry.token for entry in result[:-1])]
        expected += [tuple(tokens[c * M : (c + 1) * M]) for c in range(len(tokens) // M)]
        retrieved = [(chunk.chunk, i) for i, entry in enumerate(result) for chunk in entry.retrieved]
        # Chunk c is complete with token (c + 1) * M - 1, and known before the token after it is chosen.
        assert retrieved == [(c, max(0, (c + 1) * M - 1 - len(prompt))) for c in range(len(tokens) // M)]
    assert retriever.asked == expected


def test_without_a_retriever_the_model_is_off(model):
    plan, params = model
    sampler = Sampler(MODEL, plan, params, vocab_size=100, retriever=None)
    prompt = list(range(4, 4 + 2 * M))
    (entry,) = sampler.generate(prompt, max_new_tokens=1, decoding=Decoding(temperature=0), stop_at_end=False)
    logits = np.array(plan.merge(params)(np.asarray([[BOS_ID, *prompt]], np.int32))[0, -1])
    logits[[0, BOS_ID, UNK_ID]] = -np.inf
    logits[100:] = -np.inf  # rows beyond the tokenizer's vocabulary are never drawn
    assert entry.token == logits.argmax() and entry.retrieved == ()


def test_a_long_sequence_forgets_whole_chunks(model):
    retriever = Recorder()
    sampler = Sampler(MODEL, *model, vocab_size=MODEL.vocab_size, retriever=retriever, neighbours=K, max_context=2 * M)
    prompt = list(range(4, 4 + 4 * M))
    (entry,) = sampler.generate(prompt, max_new_tokens=1, decoding=Decoding(temperature=0), stop_at_end=False)
    tokens = np.asarray([[BOS_ID, *prompt]], np.int32)[:, 3 * M :]
    plan, params = model
    near = Recorder.neighbours(tokens[0, :M], K)[None, None].astype(np.int32)
    logits = np.array(plan.merge(params)(tokens, near)[0, -1])
    logits[[0, BOS_ID, UNK_ID]] = -np.inf
    assert entry.token == logits.argmax()


def test_a_baseline_refuses_a_database(model):
    config = RetroConfig(**{**vars(MODEL), "cca_layers": ()})
    with pytest.raises(UserError, match="sample it without a database"):
        Sampler(config, *model, vocab_size=MODEL.vocab_size, retriever=Recorder())
    with pytest.raises(UserError, match="max_context 12 must be a multiple of the chunk length 8"):
        Sampler(MODEL, *model, vocab_size=MODEL.vocab_size, retriever=None, max_context=12)
