"""Losses of a corpus are whole or refused, kept once, and not mixed up."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import K

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.losses import LossCollector, TokenLosses, kept_losses
from retro_jax.evaluation.neighbourhood import Neighbourhood, other_documents
from retro_jax.evaluation.passes import document_tokens
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.retrieval.segments import DatabaseCorpus, Segments


@pytest.fixture(scope="module")
def corpus(small_data):
    return Corpus(small_data.corpus)


def filled(corpus, *, leave_out=None):
    collector = LossCollector(corpus)
    for document in reversed(range(corpus.num_documents)):
        count = document_tokens(corpus, document) - 1
        cut = count // 2
        for first, stop in ((1 + cut, 1 + count), (1, 1 + cut)):
            if (document, first) != leave_out:
                collector.add(document, first, np.arange(first, stop) + 0.5)
    return collector


def test_losses_stand_where_their_tokens_stand_and_special_tokens_have_none(corpus):
    losses = filled(corpus).finish({"a": 1})
    tokens = corpus.tokens(np.arange(corpus.num_chunks))
    text = corpus.tokenizer.is_text(tokens)
    assert (losses.nats[~text] == 0).all() and (losses.nats[text] > 0).all()
    assert losses.settings == {"a": 1}
    for document in range(corpus.num_documents):
        expected = np.arange(1, document_tokens(corpus, document) - 1) + 0.5
        assert losses.document_nats(document).tolist() == expected.tolist()
    assert losses.chunk_nats().sum() == losses.nats.sum(dtype=np.float64)


def test_a_token_that_is_missing_twice_or_outside_is_a_defect(corpus):
    with pytest.raises(AssertionError, match="no finite loss"):
        filled(corpus, leave_out=(1, 1)).finish()
    collector = filled(corpus)
    with pytest.raises(AssertionError, match="scored twice"):
        collector.add(0, 3, np.zeros(1))
    with pytest.raises(AssertionError, match="not of document"):
        LossCollector(corpus).add(0, 0, np.zeros(1))
    with pytest.raises(AssertionError, match="not of document"):
        LossCollector(corpus).add(0, corpus.document_range(0)[1] * corpus.chunk_length, np.zeros(1))


def test_kept_losses_are_computed_once_and_not_taken_for_others(corpus, tmp_path):
    calls = []

    def compute():
        calls.append(1)
        losses = filled(corpus).finish({"tuned": 0.25})
        return TokenLosses(corpus, losses.nats, (losses.nats > 3).astype(np.int32), losses.settings)

    def kept(k=1):
        return kept_losses(tmp_path / "kept", corpus, compute, settings={"k": k}, inputs={"model": "m"})

    first, second = kept(), kept()
    assert len(calls) == 1
    assert (first.nats == second.nats).all() and (second.best == (second.nats > 3)).all()
    assert second.settings == {"tuned": 0.25}
    with pytest.raises(UserError, match=r"settings\.k = 1, now it is 2"):
        kept(k=2)


def test_losses_that_were_interrupted_are_computed_again(corpus, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    for compute, error in ((interrupted, KeyboardInterrupt), (lambda: filled(corpus).finish(), None)):
        if error:
            with pytest.raises(error):
                kept_losses(tmp_path / "kept", corpus, compute, settings={}, inputs={})
        else:
            assert kept_losses(tmp_path / "kept", corpus, compute, settings={}, inputs={}).nats.any()


def test_a_smaller_share_of_the_database_is_part_of_a_larger_one_and_keeps_the_order(small_data, corpus):
    table, database = NeighbourTable(small_data.neighbours), Corpus(small_data.database / "corpus")
    chunks = np.arange(corpus.num_chunks)
    whole = Neighbourhood(table, database, table.k).ids(chunks)
    found = {share: Neighbourhood(table, database, table.k, share=share).ids(chunks) for share in (1.0, 0.75, 0.25)}
    assert (found[1.0] == whole).all()
    kept = {share: {int(i) for i in database.document_index(ids[ids >= 0])} for share, ids in found.items()}
    assert kept[0.25] < kept[0.75] < kept[1.0]
    for row, narrowed in zip(whole, found[0.75], strict=True):
        left = [int(i) for i in row if i >= 0 and int(database.document_index(i)) in kept[0.75]]
        assert narrowed.tolist() == left + [-1] * (table.k - len(left))
    with pytest.raises(UserError, match=r"lies in \(0, 1\]"):
        Neighbourhood(table, database, K, share=0.0).check(corpus)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(lambda keys: len(set(keys)) > 1))
def test_every_document_has_one_of_another_group_for_the_control(keys):
    keys = np.array(keys)
    others = other_documents(keys)
    assert (keys[others] != keys).all() and (others == other_documents(keys)).all()
    if 2 * np.bincount(keys).max() <= len(keys):
        assert sorted(others.tolist()) == list(range(len(keys)))


def test_documents_of_one_group_have_no_control():
    with pytest.raises(UserError, match="documents of at least two groups"):
        other_documents(np.zeros(3, int))


def test_losses_are_kept_as_exactly_as_they_are_given(corpus):
    collector = LossCollector(corpus, dtype=np.float64)
    for document in range(corpus.num_documents):
        collector.add(document, 1, np.full(document_tokens(corpus, document) - 1, 1 / 3))
    assert set(np.unique(collector.finish().nats)) == {0.0, 1 / 3}


def test_neighbours_that_were_removed_from_the_database_are_refused(small_data, corpus, tmp_path):
    table, directory = NeighbourTable(small_data.neighbours), tmp_path / "database"
    shutil.copytree(small_data.database, directory)
    Neighbourhood(table, DatabaseCorpus(directory), K).check(corpus)
    chunk = int(table.ids(np.arange(1))[0, 0])
    Segments().save(directory, additions=(), removed=np.array([[chunk, chunk + 1]]))
    with pytest.raises(UserError, match=f"have been removed from {directory} since"):
        Neighbourhood(table, DatabaseCorpus(directory), K).check(corpus)
