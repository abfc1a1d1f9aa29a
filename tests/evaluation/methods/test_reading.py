"""Neighbours in the context: the same tokens are scored, rows hold what they should, nothing read is the baseline."""

import dataclasses

import numpy as np
import pytest
from small_run import M

from retro_jax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.methods.reading import Prepend, Rag, joined, pieces, reading_row
from retro_jax.evaluation.passes import scored_spans

WINDOW, STRIDE = 4 * M, 2 * M


class Nothing:
    """A table that has no neighbours."""

    def __init__(self, table):
        self.k, self.corpus_fingerprint = table.k, table.corpus_fingerprint
        self.database_corpus_fingerprint, self.fingerprint = table.database_corpus_fingerprint, "nothing"

    def ids(self, chunks):
        return np.full((*np.shape(chunks), self.k), -1)

    def distances(self, chunks):
        return np.full((*np.shape(chunks), self.k), np.inf, np.float32)


@pytest.fixture(scope="module")
def unread(valid) -> Evaluated:
    return dataclasses.replace(valid, neighbours=Nothing(valid.neighbours))


def text_of(corpus, document):
    first, chunks = corpus.document_range(document)
    return corpus.tokens(np.arange(first, first + chunks)).reshape(-1)


@pytest.mark.parametrize("every", [1, 2])
def test_pieces_are_every_text_token_once_with_the_neighbours_of_the_chunk_before(valid, every):
    corpus = valid.corpus
    seen = np.zeros((corpus.num_chunks, M), int)
    for piece in pieces(corpus, window=WINDOW, stride=STRIDE, every=every):
        start, chunks = corpus.document_range(piece.window.document)
        seen[start : start + chunks].reshape(-1)[piece.first : piece.stop] += 1
        block = piece.first // (every * M)
        assert block == (piece.stop - 1) // (every * M)
        assert piece.chunk == (start + block * every - 1 if block else -1)
    np.testing.assert_array_equal(seen, corpus.tokenizer.is_text(corpus.tokens(np.arange(corpus.num_chunks))))


@pytest.mark.parametrize("length", [0, 5, WINDOW // 2])
def test_a_row_predicts_each_token_after_the_prefix_and_the_text_before_it(valid, length):
    corpus, prefix = valid.corpus, np.arange(100, 100 + length, dtype=np.int32)
    for piece in pieces(corpus, window=WINDOW, stride=STRIDE, every=1):
        text = text_of(corpus, piece.window.document)
        tokens, labels, places = reading_row(text, prefix, piece, WINDOW, PAD_ID)
        np.testing.assert_array_equal(labels[places], text[piece.first : piece.stop])
        before = tokens[: places.start + 1].tolist()
        starts = before[0] == BOS_ID
        body = before[:1] * starts + before[length + starts :]
        assert before[starts : starts + length] == prefix.tolist()
        assert body == text[piece.first - len(body) : piece.first].tolist()
        # Nothing that fits and that the plain evaluation reads is left out.
        assert piece.first - len(body) == max(piece.window.start, piece.stop - 1 - (WINDOW - length))
        following = tokens[places.start + 1 : places.stop]
        np.testing.assert_array_equal(following, text[piece.first : piece.stop - 1])


def test_the_nearest_neighbour_stands_last_and_the_farthest_is_cut(valid):
    tokenizer = valid.corpus.tokenizer
    neighbours = np.array([[BOS_ID, 11, 12, EOS_ID, PAD_ID], [21, 22, 23, PAD_ID, PAD_ID], [PAD_ID] * 5])
    assert joined(neighbours, 9, tokenizer).tolist() == [21, 22, 23, 11, 12]
    assert joined(neighbours, 4, tokenizer).tolist() == [22, 23, 11, 12]
    assert joined(neighbours[2:], 4, tokenizer).tolist() == []


def test_reading_nothing_is_the_baseline(make_context, valid, unread):
    context = make_context()
    plain = collect(valid.corpus, scored_spans(context.plain, valid.corpus, **context.windows))
    np.testing.assert_allclose(Prepend(context).losses(unread).nats, plain.nats, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(Rag(context).losses(unread).nats, plain.nats)


def test_what_is_read_changes_predictions_whatever_the_batch_size(make_context, valid, unread):
    plain = Prepend(make_context()).losses(unread).nats
    expected = Prepend(make_context(prepended=2)).losses(valid)
    first_chunks = [valid.corpus.document_range(d)[0] for d in range(valid.corpus.num_documents)]
    changed = expected.nats != plain
    assert not changed[first_chunks].any() and changed.mean() > 0.5
    assert 0 < expected.settings["mean_tokens_prepended"] <= WINDOW / 2
    other = Prepend(make_context(prepended=2, batch_size=3)).losses(valid)
    assert other.nats.sum(dtype=np.float64) == pytest.approx(expected.nats.sum(dtype=np.float64), rel=1e-6)


def test_mixing_one_neighbour_with_all_weight_is_prepending_it(make_context, valid):
    context = make_context(prepended=1)
    rag, expected = Rag(context), Prepend(context).losses(valid)
    evidence = rag.gather(valid)
    found = rag.apply({"weight": 1.0, "sharpness": 3.0}, evidence)
    nats = np.concatenate([expected.document_nats(d) for d in range(valid.corpus.num_documents)])
    np.testing.assert_allclose(found, nats, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_readings_is_the_weighted_sum_and_tuned_no_worse_than_the_model(make_context, valid):
    rag = Rag(make_context(prepended=2))
    evidence = rag.gather(valid)
    found = rag.apply({"weight": 0.3, "sharpness": 0.5}, evidence)
    rows = np.flatnonzero(np.isfinite(evidence["distances"]).all(1))[:20]
    assert len(rows) == 20
    for row in rows:
        weights = np.exp(-0.5 * evidence["distances"][row].astype(float))
        read = (weights / weights.sum() * np.exp(-evidence["after"][row].astype(float))).sum()
        assert found[row] == pytest.approx(-np.log(0.7 * np.exp(-float(evidence.nats[row])) + 0.3 * read), rel=1e-6)
    assert rag.apply(rag.fit(evidence), evidence).sum() <= evidence.nats.sum(dtype=np.float64)


def test_a_set_without_neighbours_is_refused(make_context, database_as_set):
    with pytest.raises(UserError, match="find them first"):
        Prepend(make_context()).losses(database_as_set)
    with pytest.raises(UserError, match="database: rag is tuned with its neighbours; find them first"):
        Rag(make_context(tuning=database_as_set))
