"""One interface for neighbours: a retriever, the caller's own, or none; each asked for once; failures as chosen."""

import numpy as np
import pytest
from answers import Recorder
from small_run import MODEL, K, M

from retro_jax.errors import UserError
from retro_jax.inference.neighbours import Source, Wanted

CHUNKS = [np.arange(10 * i + 4, 10 * i + 4 + M, dtype=np.int32) for i in range(3)]


def wanted(*numbers, given=None):
    return [Wanted(number, (number + 1) * M, CHUNKS[number], (given or {}).get(number)) for number in numbers]


class Stingy(Recorder):
    def retrieve(self, chunk_tokens, k):
        return super().retrieve(chunk_tokens, k - 1)


class Broken:
    def __init__(self, error):
        self.error, self.calls = error, 0

    def retrieve(self, chunk_tokens, k):
        self.calls += 1
        raise self.error


def test_each_chunk_is_asked_for_once_and_all_at_once():
    retriever = Recorder()
    source = Source(MODEL, retriever, K)
    found = source.find(wanted(0, 1, 0))
    assert [chunk.chunk for chunk in found] == [0, 1, 0] and retriever.calls == 1
    source.find(wanted(1, 2))
    assert retriever.asked == [tuple(chunk) for chunk in CHUNKS]
    np.testing.assert_array_equal(found[1].tokens, Recorder.neighbours(CHUNKS[1], K))
    assert found[1].end == 2 * M and found[1].failure == ""


def test_the_callers_neighbours_come_first_and_are_filled_up():
    retriever = Recorder()
    (dropped, typed, asked) = Source(MODEL, retriever, K).find(wanted(0, 1, 2, given={0: [], 1: [[7, 8, 9]]}))
    assert (dropped.tokens == 0).all() and (dropped.ids == -1).all()
    assert typed.tokens[0, :4].tolist() == [7, 8, 9, 0] and (typed.tokens[1] == 0).all()
    assert np.isinf(typed.distances).all()
    assert retriever.asked == [tuple(CHUNKS[2])] and asked.tokens.any()


@pytest.mark.parametrize("error", [UserError("service at 1.2.3.4:5 is down"), TimeoutError("too late"), OSError()])
def test_a_failure_is_an_error_or_means_none_and_is_told(error):
    with pytest.raises(type(error)):
        Source(MODEL, Broken(error), K).find(wanted(0))
    broken = Broken(error)
    source = Source(MODEL, broken, K, "off")
    for _ in range(2):
        (found,) = source.find(wanted(0))
        assert found.failure == (str(error) or "OSError") and (found.tokens == 0).all()
    assert broken.calls == 1
    with pytest.raises(ZeroDivisionError):  # a defect stays a defect
        Source(MODEL, Broken(ZeroDivisionError()), K, "off").find(wanted(0))


def test_without_a_retriever_only_given_chunks_have_neighbours():
    found = Source(MODEL, None, K).find(wanted(0, 1, given={1: [[5]]}))
    assert not found[0].tokens.any() and found[1].tokens.any()


def test_what_does_not_fit_the_model_is_refused():
    for given, message in (
        ({0: [[1]] * (K + 1)}, f"{K + 1} neighbours given for one chunk"),
        ({0: [[1] * (2 * M + 1)]}, "the model reads"),
        ({0: [[MODEL.vocab_size]]}, "outside 0 to"),
    ):
        with pytest.raises(UserError, match=message):
            Source(MODEL, None, K).find(wanted(0, given=given))
    with pytest.raises(UserError, match="the model needs"):
        Source(MODEL, Stingy(), K).find(wanted(0))
    with pytest.raises(UserError, match="none of error, off"):
        Source(MODEL, None, K, "maybe")
