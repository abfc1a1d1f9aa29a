"""A Llama with GPT-2's kind of tokenizer, PAD beyond its table and one token for both ends of a document, is evaluated,
explored and sampled by its own tokens."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from small_models import LLAMA, byte_level_tokenizer, pretrained
from small_run import SAMPLE, write_random_neighbours

from retro_jax.config import DataConfig, MeshConfig, TrainConfig
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.text import read_documents
from retro_jax.evaluation.bits_per_byte import document_scores
from retro_jax.evaluation.completions import completion_scores, completion_tokens, padded_losses
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.forward import Forward
from retro_jax.evaluation.leakage import leaked_shares
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.methods import METHODS, MethodContext
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.overlap import runs_in_own_neighbours
from retro_jax.evaluation.passes import document_tokens, scored_spans
from retro_jax.explorer.explorer import Explorer
from retro_jax.explorer.session import Limits, Session
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import Sampler
from retro_jax.parallel.mesh import create_mesh
from retro_jax.retrieval.bm25 import Bm25
from retro_jax.retrieval.database import Neighbours
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.segments import DatabaseCorpus
from retro_jax.training.state import plan_model
from retro_jax.training.trained import TrainedRun

M, T, K = 4, 16, 2
PAD, END = 289, 0
RETRO = dataclasses.replace(LLAMA, vocab_size=289, pad_id=PAD, bos_id=END, eos_id=END, unk_id=-1)
TEXT = "What looks like <|endoftext|> is text, said the 日本 reader."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def evaluated(tokenizer, tmp_path_factory):
    """Six documents, one shorter than a chunk, and random neighbours in themselves."""
    root = tmp_path_factory.mktemp("set")
    texts = [document.text[: 20 * (i + 1)] for i, document in enumerate(read_documents([SAMPLE])) if i < 4]
    rows = [{"id": str(i), "text": text} for i, text in enumerate([*texts, "A", TEXT])]
    (root / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus([root / "text.jsonl"], tokenizer, root / "corpus", chunk_length=M)
    corpus = Corpus(root / "corpus")
    write_random_neighbours(root / "neighbours", corpus, corpus)
    return Evaluated("set", corpus, NeighbourTable(root / "neighbours"), DatabaseCorpus(root))


def run_of(model, tokenizer) -> TrainedRun:
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    plan = plan_model(model, mesh)
    params = jax.device_put(pretrained(model).params, jax.tree.map(lambda leaf: leaf.sharding, plan.params))
    config = TrainConfig(model=model, data=DataConfig(length=T, neighbours=K))
    return TrainedRun(tokenizer.path.parent, config, tokenizer, mesh, plan, params, 1)


@pytest.fixture(scope="module")
def retro(tokenizer):
    return run_of(RETRO, tokenizer)


@pytest.fixture(scope="module")
def baseline(tokenizer):
    return run_of(dataclasses.replace(RETRO, cca_layers=()), tokenizer)


def forward_of(run, **options) -> Forward:
    return Forward(run.plan, run.params, run.mesh, batch_size=4, **options)


def text_of(corpus, document):
    first, chunks = corpus.document_range(document)
    return corpus.tokens(np.arange(first, first + chunks)).reshape(-1)


@pytest.mark.parametrize("on", [False, True])
def test_bits_per_byte_are_those_of_a_plain_loop_over_the_logits(retro, evaluated, on):
    corpus, table = evaluated.corpus, evaluated.neighbours
    longest = max(corpus.document_range(document)[1] for document in range(corpus.num_documents))
    neighbourhood = Neighbourhood(table, evaluated.database, K) if on else None
    spans = scored_spans(forward_of(retro), corpus, window=longest * M, stride=longest * M, neighbourhood=neighbourhood)
    found = document_scores(collect(corpus, spans)).total()
    model = jax.jit(lambda tokens, neighbours: retro.plan.merge(retro.params)(tokens, neighbours))
    nats, size = 0.0, 0
    for document in range(corpus.num_documents):
        first, chunks = corpus.document_range(document)
        tokens = np.full((1, longest * M), PAD, np.int32)
        tokens[0, : chunks * M] = text_of(corpus, document)
        near = np.full((1, longest, K, 2 * M), PAD, np.int32)
        near[0, :chunks] = corpus.neighbour_tokens(table.ids(np.arange(first, first + chunks))[:, :K])
        logits = np.asarray(model(tokens, near if on else None), np.float64)[0]
        for place in range(document_tokens(corpus, document) - 2):  # the end token is not scored
            label = tokens[0, place + 1]
            nats += np.log(np.exp(logits[place]).sum()) - logits[place, label]
            size += len(corpus.tokenizer.decode_bytes([label]))
    assert found.bytes == size == corpus.num_bytes and found.tokens == corpus.num_tokens - 2 * corpus.num_documents
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_windows_and_batches_do_not_change_what_is_scored(retro, evaluated):
    corpus, where = evaluated.corpus, Neighbourhood(evaluated.neighbours, evaluated.database, K)
    spans = scored_spans(forward_of(retro, best=True), corpus, window=T, stride=T // 2, neighbourhood=where)
    losses = collect(corpus, spans)
    scored = [len(losses.document_nats(document)) for document in range(corpus.num_documents)]
    assert scored == [document_tokens(corpus, document) - 2 for document in range(corpus.num_documents)]
    assert (losses.best < RETRO.vocab_size).all() and document_scores(losses).total().bytes == corpus.num_bytes


def test_neither_padding_nor_the_end_token_is_leaked_or_a_term(evaluated):
    corpus = evaluated.corpus
    runs = runs_in_own_neighbours(corpus, Neighbourhood(evaluated.neighbours, evaluated.database, 4))
    tokens = corpus.tokens(np.arange(corpus.num_chunks))
    text = (tokens != PAD) & (tokens != END)
    assert runs[text].any() and not runs[~text].any() and (leaked_shares(corpus, runs) <= 1).all()
    bm25 = Bm25(evaluated.database)
    ids, _ = bm25.search(np.array([[END, END, PAD, PAD], text_of(corpus, 5)[M : 2 * M]]), 2)
    assert ids[0].tolist() == [-1, -1] and ids[1, 0] == corpus.document_range(5)[0] + 1


def test_completions_padded_on_the_left_cost_what_they_cost_alone(baseline, evaluated):
    corpus = evaluated.corpus
    marked = completion_tokens(corpus, {"5": "er."})
    natural = collect(corpus, scored_spans(forward_of(baseline, best=True), corpus, window=64, stride=64))
    padded = padded_losses(forward_of(baseline, best=True), corpus, marked, window=64)
    found, expected = (completion_scores(losses, marked) for losses in (padded, natural))
    assert found.bytes.tolist() == expected.bytes.tolist() and found.tokens.tolist() == [marked.sum()]
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-4)  # rotary positions are relative


@pytest.mark.parametrize("name", ["knn_lm", "cache", "prepend", "rag"])
def test_comparison_methods_score_the_same_tokens(baseline, evaluated, name, tmp_path):
    context = MethodContext(baseline, T, T // 2, 8, K, evaluated.database.directory, tmp_path)
    losses = METHODS[name](context).losses(evaluated)
    tokens = evaluated.corpus.tokens(np.arange(evaluated.corpus.num_chunks))
    np.testing.assert_array_equal(losses.nats != 0, (tokens != PAD) & (tokens != END))


class Library:
    """A retriever whose neighbour is the chunk itself, behind a document's begin."""

    def retrieve(self, chunk_tokens, k):
        tokens = np.full((len(chunk_tokens), k, 2 * M), PAD, np.int32)
        tokens[:, 0, 0], tokens[:, 0, 1 : M + 1] = END, chunk_tokens
        ids = np.where(np.arange(k) == 0, 0, -1) + np.zeros((len(chunk_tokens), 1), np.int64)
        return Neighbours(ids, np.where(ids >= 0, 0.5, np.inf).astype(np.float32), tokens)

    def refresh(self):
        return False

    def documents(self, ids):
        return [("", "") if chunk < 0 else ("itself", "Itself") for chunk in ids.tolist()]


def test_the_explorer_shows_the_text_again_with_the_bits_of_every_byte(retro):
    explorer = Explorer(retro, Library(), name="itself", neighbours=K, max_context=64, limits=Limits(100, 20))
    *_, last = explorer.generate(Session(TEXT, 6, Decoding(seed=1)))
    view = last["view"]
    whole = TEXT + view["texts"]["on"]
    assert "".join(token["text"] for token in view["tokens"]) == whole and view["texts"]["on"]
    assert view["total"]["bytes"] == sum(chunk["bytes"] for chunk in view["chunks"])
    assert explorer.view(Session.parse(json.loads(json.dumps(view["session"])))) == view
    (first, none) = view["chunks"][2]["reads"]["neighbours"]
    second = view["chunks"][1]
    read = "".join(token["text"] for token in view["tokens"][second["first"] : second["end"]])
    assert (first["state"], none["state"]) == ("retrieved", "none")
    assert "".join(part["text"] for part in first["neighbour"] + first["continuation"]) == read


def test_sampling_stops_at_the_models_own_end_token(retro):
    # Of three tokens that may be drawn the end token is one.
    sampler = Sampler(RETRO, retro.plan, retro.params, vocab_size=3, retriever=None, max_context=64)
    settings = {"max_new_tokens": 24, "decoding": Decoding(temperature=100.0, seed=2)}
    prompt = retro.tokenizer.encode("The")
    free = [token.token for token in sampler.generate(prompt, stop_at_end=False, **settings)]
    ended = [token.token for token in sampler.generate(prompt, **settings)]
    assert len(free) == 24 and END in free[1:] and ended == free[: free.index(END)]
