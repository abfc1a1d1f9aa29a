"""Bits-per-byte is exact: every byte once, the same number however the work is cut."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import MODEL, K, M, write_random_neighbours

from retro_jax.config import MeshConfig, RetroConfig
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.tokenizer import EOS_ID
from retro_jax.errors import UserError
from retro_jax.evaluation.bits_per_byte import Score, document_groups, document_scores
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import document_tokens, scored_spans
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.training.state import plan_model

WINDOW, STRIDE = 4 * M, 2 * M


def model_on(mesh, config=MODEL, scale=8.0):
    """A random model whose weights are large enough that neighbours change its predictions."""
    plan = plan_model(config, mesh)
    _, params = nnx.split(Retro(config, rngs=nnx.Rngs(3)))
    params = jax.tree.map(lambda leaf: leaf * scale, params)
    return plan, jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, plan.params))


@pytest.fixture(scope="module")
def corpus(small_data):
    return Corpus(small_data.corpus)


@pytest.fixture(scope="module")
def neighbourhood(small_data):
    return Neighbourhood(NeighbourTable(small_data.neighbours), Corpus(small_data.database / "corpus"), K)


@pytest.fixture(scope="module")
def one():
    return create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])


def losses_of(corpus, mesh, model=None, window=WINDOW, stride=STRIDE, batch_size=8, neighbourhood=None):
    plan, params = model or model_on(mesh)
    forward = Forward(plan, params, mesh, batch_size=batch_size)
    return collect(corpus, scored_spans(forward, corpus, window=window, stride=stride, neighbourhood=neighbourhood))


def score(corpus, mesh, model=None, **options):
    return document_scores(losses_of(corpus, mesh, model, **options)).total()


def test_a_uniform_model_costs_log2_of_the_vocabulary_for_each_token(corpus, one):
    found = score(corpus, one, model_on(one, scale=0.0))
    text_tokens = corpus.num_tokens - 2 * corpus.num_documents  # without start and end token
    assert found.tokens == text_tokens and found.bytes == corpus.num_bytes
    assert found.documents == corpus.num_documents
    assert found.bits_per_byte == pytest.approx(math.log2(MODEL.vocab_size) * text_tokens / corpus.num_bytes, rel=1e-7)


def test_bits_per_byte_of_a_uniform_model_is_exact(corpus):
    """A model that computes in float64 gives log2 V a token to the last digit, one in float32 to its last digit."""
    text = corpus.tokenizer.is_text(corpus.tokens(np.arange(corpus.num_chunks)))
    bits_a_byte = text.sum() / corpus.num_bytes / math.log(2)
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
            losses = losses_of(corpus, mesh, model_on(mesh, dataclasses.replace(MODEL, dtype=dtype), scale=0.0))
        assert losses.nats.dtype == dtype
        (nats,) = np.unique(losses.nats[text])
        assert abs(nats - math.log(MODEL.vocab_size)) <= np.spacing(nats)
        found = document_scores(losses).total().bits_per_byte
        assert found == pytest.approx(float(nats) * bits_a_byte, rel=1e-14)
    assert found == pytest.approx(math.log2(MODEL.vocab_size) * text.sum() / corpus.num_bytes, rel=1e-14)


@pytest.mark.parametrize("retrieval", [False, True])
def test_the_number_does_not_depend_on_batch_size_or_devices(corpus, one, neighbourhood, retrieval):
    where = neighbourhood if retrieval else None
    expected = score(corpus, one, batch_size=8, neighbourhood=where)
    for mesh, batch_size in ((one, 3), (create_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), 8)):
        found = score(corpus, mesh, batch_size=batch_size, neighbourhood=where)
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)
        assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)


def test_a_window_as_long_as_the_documents_is_the_plain_forward_pass(corpus, one, neighbourhood):
    plan, params = model_on(one)
    longest = max(corpus.document_range(d)[1] for d in range(corpus.num_documents)) * M
    found = score(corpus, one, window=longest, stride=longest, neighbourhood=neighbourhood)
    model = jax.jit(lambda params, tokens, neighbours: plan.merge(params)(tokens, neighbours))
    nats = 0.0
    for document in range(corpus.num_documents):
        first, chunks = corpus.document_range(document)
        ids = np.arange(first, first + chunks)
        padded = np.zeros((1, longest), np.int32)
        padded[0, : chunks * M] = corpus.tokens(ids).reshape(-1)
        near = np.zeros((1, longest // M, K, 2 * M), np.int32)
        near[0, :chunks] = neighbourhood.database.neighbour_tokens(neighbourhood.table.ids(ids)[:, :K])
        logits = np.asarray(model(params, padded, near), np.float64)[0]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for position in range(chunks * M - 1):
            label = padded[0, position + 1]
            if label not in (0, EOS_ID):
                nats -= log_probabilities[position, label]
    assert found.nats == pytest.approx(nats, rel=1e-6)


def test_on_off_and_shuffled_are_three_different_things(corpus, one, neighbourhood, small_data):
    model = model_on(one)
    off = score(corpus, one, model)
    on = score(corpus, one, model, neighbourhood=neighbourhood)
    other = Neighbourhood(neighbourhood.table, neighbourhood.database, K, shuffled=True)
    shuffled = score(corpus, one, model, neighbourhood=other)
    assert len({round(entry.nats, 3) for entry in (off, on, shuffled)}) == 3
    assert off.bytes == on.bytes == shuffled.bytes


def test_any_number_of_neighbours_up_to_those_stored_can_be_evaluated(corpus, one, neighbourhood):
    model = model_on(one)
    table, database = neighbourhood.table, neighbourhood.database
    nats = {k: score(corpus, one, model, neighbourhood=Neighbourhood(table, database, k)).nats for k in (1, 4)}
    assert nats[1] != nats[4]
    with pytest.raises(UserError, match="5 neighbours asked for, 4 are stored"):
        score(corpus, one, model, neighbourhood=Neighbourhood(table, database, 5))


def test_groups_add_up_to_the_whole(corpus, one):
    scores = document_scores(losses_of(corpus, one))
    whole, groups = scores.total(), scores.by_group(document_groups(corpus, "source"))
    assert len(groups) > 1
    total = sum(groups.values(), Score())
    assert total.nats == pytest.approx(whole.nats, rel=1e-12)
    assert (total.bytes, total.documents) == (whole.bytes, whole.documents)


def corpus_of_lengths(tokenizer, lengths, chunk_length, root):
    """A corpus of documents of exactly so many tokens, start and end token included."""
    texts = []
    for number, tokens in enumerate(lengths):
        text = chr(ord("A") + number)
        while len(tokenizer.encode(text)) < tokens - 2:
            text += f" {len(text) * 37 % 101}"
        while len(tokenizer.encode(text)) > tokens - 2:
            text = text[:-1]
        while len(tokenizer.encode(text)) < tokens - 2:
            text += "~"
        texts.append(text)
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus([root / "a.jsonl"], tokenizer, root / "corpus", chunk_length=chunk_length)
    corpus = Corpus(root / "corpus")
    assert [document_tokens(corpus, number) for number in range(len(lengths))] == list(lengths)
    return corpus


def test_documents_of_every_awkward_length_are_scored_whole(small_data, one, tmp_path):
    lengths = (3, M - 1, M, M + 1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + STRIDE + 1)
    corpus = corpus_of_lengths(Corpus(small_data.corpus).tokenizer, lengths, M, tmp_path)
    scores = document_scores(losses_of(corpus, one, model_on(one, scale=0.0)))
    assert scores.tokens.tolist() == [length - 2 for length in lengths]
    assert scores.bytes.sum() == corpus.num_bytes
    np.testing.assert_allclose(scores.nats, math.log(MODEL.vocab_size) * scores.tokens, rtol=1e-7)


def test_documents_at_the_edges_of_the_papers_windows_cost_the_same_however_they_are_batched(small_data, one, tmp_path):
    """Chunks of 64 and windows of 2048 every 1024 tokens, for documents shorter than a chunk and of exact lengths."""
    lengths = (20, 64, 1024, 2048, 2049, 2050, 3100)
    corpus = corpus_of_lengths(Corpus(small_data.corpus).tokenizer, lengths, 64, tmp_path)
    smaller = {"chunk_length": 64, "neighbour_length": 128, "num_layers": 1, "cca_layers": (1,), "num_heads": 1}
    config = RetroConfig(**{**vars(MODEL), **smaller})
    model = model_on(one, config)
    neighbours = tmp_path / "neighbours"
    write_random_neighbours(neighbours, corpus, corpus, k=1)
    where = Neighbourhood(NeighbourTable(neighbours), corpus, 1)
    found = {
        batch_size: losses_of(corpus, one, model, window=2048, stride=1024, batch_size=batch_size, neighbourhood=where)
        for batch_size in (1, 3)
    }
    np.testing.assert_allclose(found[1].nats, found[3].nats, rtol=1e-4, atol=1e-5)
    scores = [document_scores(losses) for losses in found.values()]
    assert scores[0].tokens.tolist() == scores[1].tokens.tolist() == [length - 2 for length in lengths]
    assert scores[0].total().bits_per_byte == pytest.approx(scores[1].total().bits_per_byte, rel=1e-6)
    assert scores[0].total().bytes == corpus.num_bytes
    # A document that one window holds is one forward pass: windows begin to matter behind 2,049 tokens.
    whole = document_scores(losses_of(corpus, one, model, window=4096, stride=4096, batch_size=2, neighbourhood=where))
    np.testing.assert_allclose(scores[0].nats[:5], whole.nats[:5], rtol=1e-6)
    assert scores[0].nats[6] != pytest.approx(whole.nats[6], rel=1e-6)


def test_a_baseline_is_scored_without_neighbours(corpus, one):
    config = RetroConfig(**{**vars(MODEL), "cca_layers": ()})
    assert score(corpus, one, model_on(one, config)).bytes == corpus.num_bytes


def test_neighbours_of_another_corpus_are_refused(corpus, one, neighbourhood):
    swapped = Neighbourhood(neighbourhood.table, corpus, K)
    with pytest.raises(UserError, match="found in another database"):
        score(corpus, one, neighbourhood=swapped)
    with pytest.raises(UserError, match="of another corpus"):
        score(neighbourhood.database, one, neighbourhood=neighbourhood)
