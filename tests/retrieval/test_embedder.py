"""Vectors are those of an independent computation, whatever the padding, and the stage records how they were made.

data/minilm_reference.npz holds the vectors of the texts in data/minilm_texts.json as computed once by transformers
5.23.0 (BertModel, float32, tokenizers 0.23.3 with encode_special_tokens) on torch 2.13.0, CPU: for each text alone,
unpadded, the mean of last_hidden_state without the first and the last position; and the token ids it was fed.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from retro_jax.errors import UserError
from retro_jax.retrieval import embedder as embedder_module
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, chunk_texts, embed_corpus

DATA = Path(__file__).parent / "data"


def test_pretrained_vectors_agree_with_transformers(minilm):
    texts = json.loads((DATA / "minilm_texts.json").read_text())
    reference = np.load(DATA / "minilm_reference.npz", allow_pickle=False)
    fed = np.split(reference["token_ids"], np.cumsum(reference["lengths"])[:-1])
    for ids, ours in zip(fed, minilm._wordpiece(texts), strict=True):
        assert ids[1:-1].tolist() == ours.tolist()
    batch = minilm.embed(texts)
    assert np.abs(batch.vectors - reference["vectors"]).max() < 1e-4
    assert not batch.empty.any() and not batch.cut.any()


def test_padding_and_company_change_nothing(minilm, embedder_directory):
    texts = json.loads((DATA / "minilm_texts.json").read_text())[:6]
    together = minilm.embed(texts).vectors
    padded = Embedder.load(embedder_directory, normalize=False, lengths=(256,), rows_per_device=1)
    assert padded.fingerprint == minilm.fingerprint
    assert np.abs(padded.embed([texts[4], "", texts[0]]).vectors[[2, 0]] - together[[0, 4]]).max() < 1e-5


def test_bfloat16_products_give_comparable_vectors(minilm, embedder_directory):
    texts = json.loads((DATA / "minilm_texts.json").read_text())
    quick = Embedder.load(embedder_directory, normalize=False, compute_dtype="bfloat16", lengths=(256,))
    assert quick.fingerprint == minilm.fingerprint
    assert quick.settings != minilm.settings  # so that one data set is not made of both
    ours, exact = quick.embed(texts).vectors, minilm.embed(texts).vectors
    cosine = (ours * exact).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(exact, axis=1)
    assert 0.9999 < cosine.min() < cosine.max() < 1 - 1e-7


def test_meaning_is_near(minilm):
    a, b, c = minilm.embed(
        ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose in May."]
    ).vectors
    assert ((a - b) ** 2).sum() < 0.5 * ((a - c) ** 2).sum()


def test_empty_and_cut_texts_are_flagged(tiny_embedder):
    texts = ["", "a", "\u200b \n", "b " * 94, "b " * 95, "b " * 5000]
    batch = tiny_embedder.embed(texts)
    assert batch.empty.tolist() == [True, False, True, False, False, False]
    assert batch.cut.tolist() == [False, False, False, False, True, True]
    assert batch.vectors.dtype == np.float32
    assert (batch.vectors.any(1) == ~batch.empty).all()
    np.testing.assert_array_equal(batch.vectors[3], batch.vectors[4])  # what is cut off is not read
    assert tiny_embedder.embed([]).vectors.shape == (0, 24)


def test_normalized_vectors_have_length_one_and_another_fingerprint(tmp_path, tiny_embedder):
    directory = tiny_bert.write_tiny_bert(tmp_path)
    normal = Embedder.load(directory, normalize=True, max_length=96)
    vectors = normal.embed(["one text", "", "another one"]).vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 1], atol=1e-6)
    fingerprints = {normal.fingerprint, tiny_embedder.fingerprint}
    fingerprints.add(Embedder.load(directory, normalize=True, max_length=95).fingerprint)
    other = tiny_bert.write_tiny_bert(tmp_path / "other", seed=1)
    fingerprints.add(Embedder.load(other, normalize=True, max_length=96).fingerprint)
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    fingerprints.add(Embedder.load(directory, normalize=True, max_length=96).fingerprint)
    assert len(fingerprints) == 5


def test_settings_that_do_not_fit_the_checkpoint_are_refused(tmp_path):
    directory = tiny_bert.write_tiny_bert(tmp_path)
    with pytest.raises(UserError, match="max_length must be 3 to 96"):
        Embedder.load(directory, normalize=False, max_length=97)
    with pytest.raises(UserError, match="'float16' is none of float32, bfloat16"):
        Embedder.load(directory, normalize=False, max_length=96, compute_dtype="float16")
    with open(directory / "vocab.txt", "a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="not of one checkpoint"):
        Embedder.load(directory, normalize=False, max_length=96)


def test_corpus_is_embedded_once_resumed_by_shard_and_counted(make_corpus, tiny_embedder, tmp_path, monkeypatch):
    corpus = make_corpus(
        [
            [{"text": "the cat of the house " * 6}, {"text": "\u200b" * 30}],
            [{"text": "a dog and 3 birds. " * 9}],
            [{"text": "c d e f g h i j k l m n o p " * 2}],
        ]
    )
    assert corpus.num_chunks < 60
    done = []
    real = embedder_module._embed_shard

    def failing(corpus, embedder, path, start, stop, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((start, stop))
        return real(corpus, embedder, path, start, stop, progress)

    monkeypatch.setattr(embedder_module, "_embed_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        embed_corpus(corpus, tiny_embedder, tmp_path / "resumed")
    with pytest.raises(UserError, match="was begun and not finished"):
        EmbeddingSet(tmp_path / "resumed")
    done.clear()
    embed_corpus(corpus, tiny_embedder, tmp_path / "resumed")
    assert done == [tuple(corpus.shard_offsets[2:4])]
    monkeypatch.setattr(embedder_module, "_embed_shard", real)
    manifest = embed_corpus(corpus, tiny_embedder, tmp_path / "once")
    resumed, once = EmbeddingSet(tmp_path / "resumed", verify=True), EmbeddingSet(tmp_path / "once", verify=True)
    assert resumed.fingerprint == once.fingerprint
    ids = np.arange(corpus.num_chunks)
    direct = tiny_embedder.embed(chunk_texts(corpus.tokens(ids), corpus.tokenizer))
    np.testing.assert_allclose(once.vectors(ids), direct.vectors, atol=1e-6)
    assert manifest.counts == {"chunks": corpus.num_chunks, "empty": int(direct.empty.sum()), "cut": 0}
    assert manifest.counts["empty"] > 0
    assert once.corpus_fingerprint == corpus.fingerprint and once.embedder_fingerprint == tiny_embedder.fingerprint
    shuffled = np.random.default_rng(0).permutation(ids)
    np.testing.assert_array_equal(once.vectors(shuffled), once[0 : len(ids)][shuffled])
    with pytest.raises(IndexError):
        once.vectors(np.array([corpus.num_chunks]))


def test_another_embedder_does_not_continue_a_directory(make_corpus, tiny_embedder, tmp_path):
    corpus = make_corpus([[{"text": "the cat of the house " * 6}]])
    embed_corpus(corpus, tiny_embedder, tmp_path / "embeddings")
    other = Embedder.load(tiny_bert.write_tiny_bert(tmp_path / "bert", seed=3), normalize=False, max_length=96)
    with pytest.raises(UserError, match="weights_sha256"):
        embed_corpus(corpus, other, tmp_path / "embeddings")


def test_damaged_weights_are_noticed(make_corpus, tmp_path):
    corpus = make_corpus([[{"text": "the cat of the house " * 6}]])
    directory = tiny_bert.write_tiny_bert(tmp_path / "bert", layer_norm_eps=float("nan"))
    with pytest.raises(UserError, match="not finite"):
        embed_corpus(corpus, Embedder.load(directory, normalize=False, max_length=96), tmp_path / "embeddings")


def test_damaged_shards_are_named(make_embeddings):
    embeddings = make_embeddings([np.ones((4, 3))])
    shard = embeddings.directory / embeddings.manifest.shards[0].name
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="checksum differs"):
        EmbeddingSet(embeddings.directory, verify=True)
    shard.write_bytes(data[:-4])
    with pytest.raises(UserError, match="the manifest says"):
        EmbeddingSet(embeddings.directory)
