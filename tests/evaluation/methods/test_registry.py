"""Every method scores the same tokens, and says what it is made from; a RETRO reads BM25's neighbours."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluation.losses import collect
from retro_jax.evaluation.methods import METHODS, check_methods
from retro_jax.evaluation.neighbourhood import Neighbourhood
from retro_jax.evaluation.passes import scored_spans
from retro_jax.retrieval.segments import Segments


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_the_same_tokens_and_describes_itself(make_context, valid, retro, name, tmp_path):
    kind = METHODS[name]
    method = kind(
        make_context(retro if kind.for_retro else None, tuning=valid, work=tmp_path if kind.for_retro else None)
    )
    scored = valid.corpus.tokenizer.is_text(valid.corpus.tokens(np.arange(valid.corpus.num_chunks)))
    asked = scored & (np.random.default_rng(0).random(scored.shape) < 0.1)
    losses = method.losses(valid, asked)
    assert method.name == name
    assert (losses.best is None) == (name == "rag") and (name == "rag" or (losses.best[asked] >= 0).all())
    np.testing.assert_array_equal(losses.nats != 0, scored)
    json.dumps([method.settings, method.inputs, losses.settings])


def test_what_is_taken_out_of_the_database_is_a_change_to_the_methods_that_read_it(
    make_context, retro, small_data, tmp_path
):
    database = tmp_path / "database"
    shutil.copytree(small_data.database, database)
    kinds = [(METHODS[name], make_context(retro if METHODS[name].for_retro else None)) for name in ("knn_lm", "bm25")]
    before = [kind(dataclasses.replace(context, database=database)).inputs for kind, context in kinds]
    Segments().save(database, additions=(), removed=np.array([[0, 1]]))
    after = [kind(dataclasses.replace(context, database=database)).inputs for kind, context in kinds]
    assert all("removed" not in inputs for inputs in before)
    assert [{**inputs, "removed": after[0]["removed"]} for inputs in before] == after


def test_another_name_is_refused_with_the_nearest():
    check_methods(METHODS)
    with pytest.raises(UserError, match=r"'knnlm' is no comparison method; did you mean 'knn_lm'\?"):
        check_methods(["cache", "knnlm"])


def test_a_retro_reads_the_neighbours_of_bm25_and_of_the_reranking(make_context, valid, retro, baseline, tmp_path):
    context = make_context(retro, work=tmp_path)
    dense = Neighbourhood(valid.neighbours, valid.database, context.k)
    expected = collect(valid.corpus, scored_spans(context.plain, valid.corpus, **context.windows, neighbourhood=dense))
    tables = {}
    for name in ("bm25", "bm25_rerank"):
        method = METHODS[name](context)
        tables[name] = method.table(valid)
        assert (method.losses(valid).nats != expected.nats).any()
    chunks = np.arange(valid.corpus.num_chunks)
    reranked, offered = tables["bm25_rerank"].ids(chunks), valid.neighbours.ids(chunks)
    assert all(set(found) <= set(some) for found, some in zip(reranked, offered, strict=True))
    assert (tables["bm25"].distances(chunks)[:, 0] <= tables["bm25_rerank"].distances(chunks)[:, 0] + 1e-4).all()
    with pytest.raises(UserError, match="bm25 is for a RETRO"):
        METHODS["bm25"](make_context(baseline))
