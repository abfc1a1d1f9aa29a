"""Sampling retrieves at each chunk boundary and equals the full forward pass at every position."""

import dataclasses

import jax
import numpy as np
import pytest
from answers import Recorder
from flax import nnx
from small_run import MODEL, K, M

from retro_jax.config import MeshConfig
from retro_jax.data.tokenizer import BOS_ID, EOS_ID, UNK_ID
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model

GREEDY = Decoding(temperature=0)
LENGTHS = (1, M - 1, M, M + 1, 2 * M, 3 * M - 1)  # the start token included


def prompt(length, seed=0):
    return np.random.default_rng((seed, length)).integers(4, MODEL.vocab_size, length - 1).tolist()


@dataclasses.dataclass
class Model:
    config: object
    plan: object
    params: object
    mesh: object

    def sampler(self, retriever, **options):
        options = {"vocab_size": MODEL.vocab_size, "neighbours": K, "max_context": 8 * M, "mesh": self.mesh} | options
        return Sampler(self.config, self.plan, self.params, retriever=retriever, **options)

    def logits(self, tokens, *, on, pad=0, near=None):
        """[T, V] of the full forward pass over one text with `pad` PADs at its left.

        Neighbours [L, K, R] are those that Recorder gives, unless others are given.
        """
        # One length for all, so that one program does; what comes after a place does not matter to it.
        padded, found = np.zeros((1, 8 * M), np.int32), None
        padded[0, pad : pad + len(tokens)] = tokens
        if on:
            found = np.zeros((1, 8, K, 2 * M), np.int32)
            for number in range((pad + len(tokens)) // M):
                chunk = padded[0, number * M : (number + 1) * M]
                found[0, number] = Recorder.neighbours(chunk, K) if near is None else near[number]
        logits = np.array(self._forward(self.params, padded, found)[0, pad : pad + len(tokens)], np.float64)
        logits[:, [0, BOS_ID, UNK_ID]] = -np.inf
        return logits

    def __post_init__(self):
        self._forward = jax.jit(lambda params, tokens, near: self.plan.merge(params)(tokens, near))

    def check(self, start, result, *, on):
        """Each token of `result` is the most likely one, and its log-probability is right."""
        tokens = [BOS_ID, *start, *(entry.token for entry in result)]
        logits = self.logits(tokens, on=on)[len(start) : -1]
        assert [entry.token for entry in result] == logits.argmax(axis=1).tolist()
        expected = logits.max(axis=1) - np.log(np.exp(logits).sum(axis=1))
        np.testing.assert_allclose([entry.log_probability for entry in result], expected, atol=1e-5)


def make(config, mesh):
    _, params = nnx.split(Retro(config, rngs=nnx.Rngs(5)))
    plan = plan_model(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.params)
    return Model(config, plan, jax.device_put(jax.tree.map(lambda leaf: leaf * 3, params), shardings), mesh)


@pytest.fixture(scope="module")
def model():
    return make(MODEL, create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def shared(model):
    """(sampler, its retriever) for all tests that need no other, so that it is compiled once."""
    retriever = Recorder()
    return model.sampler(retriever), retriever


@pytest.fixture
def on(shared):
    return shared[0]


@pytest.fixture
def retriever(shared):
    """That of `on`, which has not been asked yet."""
    shared[1].asked.clear()
    return shared[1]


def batch(sampler, lengths, count, decoding=GREEDY, **options):
    """Results of one batch of prompts of these lengths."""
    results = {length: [] for length in lengths}
    requests = [Request(prompt(length)) for length in lengths]
    for index, token in sampler.generate_batch(
        requests, max_new_tokens=count, decoding=decoding, stop_at_end=False, **options
    ):
        results[lengths[index]].append(token)
    return results


def test_a_batch_of_different_prompts_equals_the_full_forward_pass(model, on):
    results = batch(on, LENGTHS, 2 * M + 3)
    for length, result in results.items():
        assert len(result) == 2 * M + 3
        model.check(prompt(length), result, on=True)


def test_without_a_retriever_the_model_is_off(model):
    sampler = model.sampler(None)
    for length, result in batch(sampler, LENGTHS, M + 2).items():
        model.check(prompt(length), result, on=False)
        assert not any(entry.retrieved for entry in result)
    few = model.sampler(None, vocab_size=100)  # rows beyond the tokenizer's vocabulary are never drawn
    drawn = few.generate(prompt(3), max_new_tokens=40, decoding=Decoding(temperature=3.0), stop_at_end=False)
    assert max(entry.token for entry in drawn) < 100


def test_alone_or_in_a_batch_is_the_same(on):
    together = batch(on, LENGTHS, M + 3, Decoding(seed=4))
    for length in (M - 1, 2 * M):
        result = together[length]
        alone = list(on.generate(prompt(length), max_new_tokens=M + 3, decoding=Decoding(seed=4), stop_at_end=False))
        assert [entry.token for entry in alone] == [entry.token for entry in result]
        assert [[chunk.chunk for chunk in entry.retrieved] for entry in alone] == [
            [chunk.chunk for chunk in entry.retrieved] for entry in result
        ]


@pytest.mark.parametrize("length", LENGTHS)
def test_each_complete_chunk_is_retrieved_once_and_in_order(on, retriever, length):
    count = 2 * M + 2
    result = list(on.generate(prompt(length), max_new_tokens=count, decoding=GREEDY, stop_at_end=False))
    tokens = [BOS_ID, *prompt(length), *(entry.token for entry in result[:-1])]
    chunks = len(tokens) // M
    # Equal chunks (a greedy text may repeat itself) are asked for once.
    assert retriever.asked == list(dict.fromkeys(tuple(tokens[c * M : (c + 1) * M]) for c in range(chunks)))
    retrieved = [(chunk.chunk, chunk.end, i) for i, entry in enumerate(result) for chunk in entry.retrieved]
    # Chunk c is complete with token (c + 1) * M - 1, and known before the token after it is chosen.
    assert retrieved == [(c, (c + 1) * M, max(0, (c + 1) * M - length)) for c in range(chunks)]


def test_once_warm_nothing_is_compiled_again(on):
    batch(on, (5,), 2 * M)
    before = on.compiled()
    for number, length in enumerate(LENGTHS):
        settings = Decoding(temperature=0.7 + number / 10, top_k=number, top_p=0.9, seed=number, min_p=0.01)
        batch(on, (length,), 2 * M + number, settings, burst=number + 1)
    assert on.compiled() == before


def test_the_host_is_asked_once_a_chunk(on, monkeypatch):
    trips, fetch = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda values: trips.append(values) or fetch(values))
    result = list(on.generate(prompt(2 * M), max_new_tokens=3 * M, decoding=GREEDY, stop_at_end=False))
    # The first token, which needs the neighbours of the chunk before it, comes by itself.
    assert len(result) == 3 * M and len(trips) == 1 + 3


def test_the_penalty_keeps_a_text_from_repeating_what_it_has(on):
    usual = batch(on, LENGTHS, 2 * M)
    penalised = batch(on, LENGTHS, 2 * M, Decoding(temperature=0, repetition_penalty=1e6))
    texts = {length: [entry.token for entry in result] for length, result in usual.items()}
    assert any(len(set(text)) < len(text) for text in texts.values())
    for length, result in penalised.items():
        text = [*prompt(length), *(entry.token for entry in result)]
        fresh = text[length - 1 :]
        assert len(set(fresh)) == len(fresh) and not set(fresh) & set(text[: length - 1])


def test_several_samples_of_one_prompt_differ_and_repeat(on, retriever):
    start = prompt(2 * M + 1)

    def samples(seed):
        found = [[] for _ in range(5)]
        requests = [Request(start, sample=number) for number in range(5)]
        for index, entry in on.generate_batch(requests, max_new_tokens=6, decoding=Decoding(seed=seed)):
            found[index].append(entry.token)
        return found

    first = samples(1)
    assert len(retriever.asked) == 2  # the prompt's chunks, once for all
    assert first == samples(1) != samples(2) and first[0] != first[1] != first[2]


def test_a_text_ends_with_the_end_token_or_when_the_caller_says_so(model, on):
    # Greedy texts repeat; an end token is made likely by drawing hot.
    hot = Decoding(temperature=50.0, seed=3)
    whole = list(on.generate(prompt(4), max_new_tokens=5 * M, decoding=hot, stop_at_end=False))
    ends = [entry.token for entry in whole]
    told = batch(on, LENGTHS, 2 * M, stop=lambda row, entry: row < 5)
    assert [len(result) for result in told.values()] == [1, 1, 1, 1, 1, 2 * M]
    model.check(prompt(LENGTHS[-1]), told[LENGTHS[-1]], on=True)
    if EOS_ID in ends:
        cut = list(on.generate(prompt(4), max_new_tokens=5 * M, decoding=hot))
        assert [entry.token for entry in cut] == ends[: ends.index(EOS_ID)]


def test_tokens_come_as_soon_as_they_are_known(on, retriever):
    stream = on.generate(prompt(M - 2), max_new_tokens=3 * M, decoding=GREEDY, stop_at_end=False)
    for _ in range(2):
        next(stream)
    assert retriever.asked == []  # the second token completes the chunk; who stops here needs no neighbours
    next(stream)
    assert len(retriever.asked) == 1


def test_a_long_sequence_forgets_whole_chunks(model):
    sampler = model.sampler(Recorder(), max_context=2 * M)
    start = prompt(4 * M + 1)
    result = list(sampler.generate(start, max_new_tokens=M + 2, decoding=GREEDY, stop_at_end=False))
    tokens = [BOS_ID, *start]
    for entry in result:
        dropped = max(0, -(-(len(tokens) - 2 * M) // M)) * M
        assert entry.token == model.logits(tokens[dropped:], on=True)[-1].argmax()
        tokens.append(entry.token)


@pytest.mark.parametrize("step", [1, 3, M])
def test_the_retrieval_step_cuts_the_text_anew_so_that_it_ends_with_a_chunk(model, step):
    retriever = Recorder()
    sampler = model.sampler(retriever, retrieval_step=step, left_pad=True)
    start = prompt(M + 4)
    result = list(sampler.generate(start, max_new_tokens=7, decoding=GREEDY, stop_at_end=False))
    tokens = [BOS_ID, *start]
    for number, entry in enumerate(result):
        if number % step == 0:
            pad = -len(tokens) % M
        assert entry.token == model.logits(tokens, on=True, pad=pad)[-1].argmax()
        assert bool(entry.retrieved) == (number % step == 0)
        if entry.retrieved:
            assert entry.retrieved[-1].end == len(tokens)
        tokens.append(entry.token)


def test_a_short_prompt_padded_at_the_left_has_neighbours(model):
    retriever = Recorder()
    sampler = model.sampler(retriever, left_pad=True)
    first = next(sampler.generate(prompt(3), max_new_tokens=2, decoding=GREEDY))
    assert retriever.asked == [(0,) * (M - 3) + (BOS_ID, *prompt(3))]
    assert first.token == model.logits([BOS_ID, *prompt(3)], on=True, pad=M - 3)[-1].argmax()
    assert [chunk.end for chunk in first.retrieved] == [3]


def test_given_neighbours_take_the_place_of_retrieved_ones(model, on, retriever):
    start = prompt(2 * M + 1)
    own = Recorder.neighbours(np.asarray([99]), K)
    given = list(on.generate(start, max_new_tokens=2, decoding=GREEDY, given={1: own}))
    assert len(retriever.asked) == 1
    (_, chunk) = given[0].retrieved
    assert (chunk.chunk, chunk.ids.tolist()) == (1, [-1] * K)
    np.testing.assert_array_equal(chunk.tokens, own)
    near = [Recorder.neighbours(np.asarray([BOS_ID, *start][:M]), K), own]
    row = model.logits([BOS_ID, *start], on=True, near=near)[-1]
    assert given[0].token == row.argmax()
    assert given[0].log_probability == pytest.approx(row.max() - np.log(np.exp(row).sum()), abs=1e-5)


def test_a_failed_retrieval_goes_on_without_neighbours_when_asked_to(model):
    class Late:
        def retrieve(self, chunk_tokens, k):
            raise TimeoutError("the service missed its deadline")

    with pytest.raises(TimeoutError):
        list(model.sampler(Late()).generate(prompt(M), max_new_tokens=2, decoding=GREEDY))
    sampler = model.sampler(Late(), on_retrieval_failure="off")
    result = list(sampler.generate(prompt(M + 1), max_new_tokens=M, decoding=GREEDY, stop_at_end=False))
    assert result[0].retrieved[0].failure == "the service missed its deadline"
    model.check(prompt(M + 1), result, on=False)


@pytest.mark.parametrize("positions", ["transformer_xl", pytest.param("rope", marks=pytest.mark.slow)])
def test_sharded_over_eight_devices_equals_the_full_forward_pass(positions):
    config = dataclasses.replace(MODEL, positions=positions)
    single = make(config, create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1]))
    mesh = create_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sampler = make(config, mesh).sampler(Recorder())
    for length, result in batch(sampler, (1, M, M + 3, 2 * M), M + 2).items():
        single.check(prompt(length), result, on=True)


def test_mistakes_are_named(model):
    baseline = dataclasses.replace(MODEL, cca_layers=())
    with pytest.raises(UserError, match="sample it without a database"):
        dataclasses.replace(model, config=baseline).sampler(Recorder())
    with pytest.raises(UserError, match="max_context 12 must be a multiple of the chunk length 8"):
        model.sampler(None, max_context=12)
    with pytest.raises(UserError, match="retrieval_step 9 must be between 1 and the chunk length 8"):
        model.sampler(None, retrieval_step=9)
