"""kNN-LM: keys are the last feed-forward layer's input, the datastore is complete, and it remembers what it holds."""

import shutil

import jax
import numpy as np
import pytest
from small_run import MODEL, M

from retro_jax.data.tokenizer import EOS_ID
from retro_jax.errors import UserError
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.methods import datastore as datastore_module
from retro_jax.evaluation.methods import knn_lm as knn_lm_module
from retro_jax.evaluation.methods.activations import key_params, predictions
from retro_jax.evaluation.methods.cache import ContinuousCache
from retro_jax.evaluation.methods.datastore import build_datastore
from retro_jax.evaluation.methods.gate import Spalm, gate, train_gate
from retro_jax.evaluation.methods.knn_lm import KnnLm
from retro_jax.evaluation.methods.mixture import mix
from retro_jax.evaluation.methods.tuned import second_half
from retro_jax.evaluation.passes import scored_spans
from retro_jax.model.layers import FeedForward
from retro_jax.retrieval.embedder import EmbeddingSet


@pytest.mark.parametrize("cca_layers", [(), (1, 2), (2,)])
def test_keys_are_what_the_last_feed_forward_layer_reads(valid, make_run, monkeypatch, cca_layers):
    run = make_run(cca_layers=cca_layers, scan_layers=False)
    tokens = valid.corpus.tokens(np.arange(4)).reshape(1, -1)
    hidden = jax.jit(lambda params: run.plan.merge(params).hidden(tokens))
    found = hidden(key_params(run.plan, run.params))
    inputs, apply = [], FeedForward.__call__

    def watched(self, x):
        inputs.append(self.norm(x))
        return apply(self, x)

    monkeypatch.setattr(FeedForward, "__call__", watched)
    read = jax.jit(lambda params: (run.plan.merge(params).hidden(tokens), inputs[-1])[1])
    np.testing.assert_allclose(found, read(run.params), rtol=1e-5, atol=1e-6)


def test_the_datastore_holds_every_token_of_the_database_once_and_in_order(make_context, database_as_set):
    context = make_context()
    store = build_datastore(context, context.work / "datastore")
    corpus = database_as_set.corpus
    tokens = corpus.tokens(np.arange(corpus.num_chunks))
    labels = tokens[tokens > 1]  # neither padding nor start tokens
    np.testing.assert_array_equal(store.values, labels)
    found = list(predictions(context.with_keys, corpus, **context.windows, with_end=True))
    np.testing.assert_array_equal(np.concatenate([one.labels for one in found]), labels)
    keys = EmbeddingSet(context.work / "datastore" / "keys", verify=True)
    assert len(keys) == len(labels)
    expected = np.concatenate([one.states for one in found]).astype(np.float16)
    np.testing.assert_allclose(keys[:], expected.astype(np.float32), atol=2e-3)


def test_a_datastore_that_was_interrupted_goes_on_and_ends_with_the_same_bytes(make_context, tmp_path, monkeypatch):
    monkeypatch.setattr(datastore_module, "_CHUNKS_A_SHARD", 40)
    context = make_context()
    build_datastore(context, tmp_path / "whole")
    written, write = [], datastore_module.predictions

    def stopping(*arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(options["documents"])
        return write(*arguments, **options)

    monkeypatch.setattr(datastore_module, "predictions", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_datastore(context, tmp_path / "resumed")
    monkeypatch.setattr(datastore_module, "predictions", write)
    build_datastore(context, tmp_path / "resumed")
    whole, resumed = (EmbeddingSet(tmp_path / name / "keys") for name in ("whole", "resumed"))
    assert len(whole.manifest.shards) > 2
    assert whole.manifest == resumed.manifest
    with pytest.raises(UserError, match=r"settings\.embedder\.stride"):
        build_datastore(make_context(stride=M), tmp_path / "whole")


def test_a_share_of_the_database_is_evenly_spread(make_context, database_as_set, tmp_path):
    store = build_datastore(make_context(datastore_share=0.5), tmp_path)
    corpus = database_as_set.corpus
    sizes = [corpus.document_range(d)[1] for d in range(corpus.num_documents)]
    assert 0.2 * sum(sizes) * M < len(store.values) < 0.8 * sum(sizes) * M


def test_scann_finds_what_exact_search_finds(make_context, database_as_set, tmp_path):
    exact = build_datastore(make_context(datastore_search="exact"), tmp_path)
    queries = EmbeddingSet(tmp_path / "keys")[:50]
    scann = build_datastore(make_context(datastore_search="brute_force"), tmp_path)
    for ours, theirs in zip(scann.search(queries, 3), exact.search(queries, 3), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    # An index that is there is taken, however it was built.
    assert build_datastore(make_context(datastore_search="tree"), tmp_path).fingerprint == scann.fingerprint
    other = build_datastore(make_context(datastore_search="exact", datastore_share=0.5), tmp_path / "other")
    assert other.fingerprint != exact.fingerprint
    shutil.copytree(tmp_path / "index", tmp_path / "other" / "index")
    with pytest.raises(UserError, match="built from other keys"):
        build_datastore(make_context(datastore_search="brute_force", datastore_share=0.5), tmp_path / "other")


def plain_losses(context, corpus):
    """What launch/evaluate.py gives for the model alone."""
    return collect(corpus, scored_spans(context.plain, corpus, **context.windows))


def test_a_weight_of_zero_is_the_baseline_bit_for_bit(make_context, valid, monkeypatch):
    context = make_context()
    monkeypatch.setattr(knn_lm_module, "_WEIGHT", 0.0)
    np.testing.assert_array_equal(KnnLm(context).losses(valid).nats, plain_losses(context, valid.corpus).nats)


@pytest.mark.parametrize("kind", [KnnLm, Spalm, ContinuousCache])
def test_with_no_weight_the_most_probable_tokens_are_the_models(make_context, valid, kind, monkeypatch):
    context = make_context(tuning=valid)
    asked = valid.corpus.tokenizer.is_text(valid.corpus.tokens(np.arange(valid.corpus.num_chunks)))
    asked &= np.random.default_rng(0).random(asked.shape) < 0.1
    closed = {"weight": 0.0, "sharpness": 1.0, "theta": 4.0, "kernel": np.zeros(MODEL.width), "bias": -1e3}
    monkeypatch.setattr(kind, "fit", lambda self, evidence: closed)
    losses = kind(context).losses(valid, asked)
    expected = collect(valid.corpus, scored_spans(context.with_best, valid.corpus, **context.windows))
    np.testing.assert_array_equal(losses.best, np.where(asked, expected.best, -1))
    assert len(np.unique(losses.best)) > 2


def test_a_datastore_that_holds_the_text_itself_tells_every_token(make_context, database_as_set, monkeypatch):
    sure = {"weight": 1 - 1e-6, "sharpness": 1e3}
    monkeypatch.setattr(KnnLm, "fixed", lambda self, evidence: sure)
    corpus = database_as_set.corpus
    tokens = corpus.tokens(np.arange(corpus.num_chunks))
    asked = corpus.tokenizer.is_text(tokens) & (np.arange(corpus.num_chunks)[:, None] % 9 == 4)
    losses = KnnLm(make_context()).losses(database_as_set, asked)
    right = losses.best == tokens
    assert right[asked].mean() > 0.95 and (losses.best[~asked] == -1).all()


def test_a_datastore_that_holds_the_text_itself_drives_drives_its_loss_to_nearly_nothing(make_context, database_as_set):
    context = make_context()
    method = KnnLm(context)
    evidence = method.gather(database_as_set)
    plain = evidence.nats.mean()
    sure = method.apply({"weight": 1 - 1e-6, "sharpness": 1e3}, evidence).mean()
    assert plain > 5 and sure < 0.02 * plain
    tuned = method.fit(evidence)
    assert tuned["weight"] > 0.9 and method.apply(tuned, evidence).mean() < 0.05 * plain


def test_losses_do_not_depend_on_the_batch_size(make_context, valid, tmp_path):
    short = {"window": M, "stride": M, "datastore_share": 0.2}
    expected = KnnLm(make_context(work=tmp_path / "a", **short)).losses(valid)
    other = KnnLm(make_context(work=tmp_path / "b", batch_size=3, **short)).losses(valid)
    np.testing.assert_allclose(other.nats, expected.nats, rtol=1e-3, atol=1e-4)
    assert other.nats.sum(dtype=np.float64) == pytest.approx(expected.nats.sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("kind", [KnnLm, Spalm])
def test_what_is_tuned_is_never_worse_than_the_model_on_what_it_is_tuned_on(make_context, valid, kind):
    method = kind(make_context(tuning=valid))
    evidence = method.gather(valid)
    assert method.apply(method.fit(evidence), evidence).sum() <= evidence.nats.sum(dtype=np.float64) * (1 + 1e-12)


def test_a_set_that_is_tuned_on_is_scored_with_what_was_tuned_on_its_other_half(make_context, valid, monkeypatch):
    seen = []

    def fit(self, evidence):
        seen.append(set(evidence.documents))
        return {"weight": 0.1 * len(seen), "sharpness": 1.0}

    monkeypatch.setattr(KnnLm, "fit", fit)
    method = KnnLm(make_context(tuning=valid))
    losses = method.losses(valid)
    halves = [set(np.flatnonzero(second_half(valid.corpus) == side)) for side in (True, False)]
    assert seen == halves and all(halves) and not halves[0] & halves[1]
    assert [entry["weight"] for entry in losses.settings["parameters"]] == [0.1, 0.2]
    evidence = method.gather(valid)
    for document, weight in ((min(halves[1]), 0.1), (min(halves[0]), 0.2)):
        rows = evidence.of(evidence.documents == document)
        expected = method.apply({"weight": weight, "sharpness": 1.0}, rows)
        np.testing.assert_allclose(losses.document_nats(document), expected, rtol=1e-6)


def test_another_tuning_set_is_used_whole(make_context, valid, database_as_set):
    context = make_context(tuning=database_as_set)
    losses = KnnLm(context).losses(valid)
    assert losses.settings["tuned_on"] == "database" and losses.settings["parameters"][0]["weight"] > 0.9


def test_a_gate_learns_which_tokens_the_neighbours_know():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2000, 5)).astype(np.float32)
    known = states[:, 2] > 0
    nats, found = np.full(2000, 3.0), np.where(known, np.log(0.9), -np.inf)
    kernel, bias = train_gate(states, nats, found, 0.4)
    trusted = gate(states, kernel, bias)
    assert trusted[known].mean() > 0.8 and trusted[~known].mean() < 0.2
    assert mix(nats, found, trusted).sum() < 0.8 * mix(nats, found, 0.4).sum()


def test_a_gate_where_the_neighbours_know_nothing_stays_closed(make_context):
    states = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    kernel, bias = train_gate(states, np.full(50, 2.0), np.full(50, -np.inf), 0.0)
    np.testing.assert_array_equal(mix(np.full(50, 2.0), np.full(50, -np.inf), gate(states, kernel, bias)), 2.0)
    with pytest.raises(UserError, match="spalm is trained on a tuning set"):
        Spalm(make_context())


def test_a_damaged_datastore_is_named(make_context, tmp_path):
    context = make_context()
    assert EOS_ID in build_datastore(context, context.work / "datastore").values
    shutil.copytree(context.work / "datastore", tmp_path / "datastore")
    shard = next((tmp_path / "datastore" / "keys").glob("keys-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="the manifest says"):
        build_datastore(context, tmp_path / "datastore")
