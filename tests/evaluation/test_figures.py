"""What documents.jsonl says beside the text is read strictly, and what figures depend on has a digest."""

import json
import types

import pytest

from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.evaluation.evaluated import Evaluated
from retro_jax.evaluation.figures import Examined
from retro_jax.evaluation.suite import Settings, Suite
from retro_jax.retrieval.neighbours import NeighbourTable


@pytest.fixture
def corpus(small_data):
    return Corpus(small_data.corpus)


def examined(directory, corpus, *rows):
    (directory / "documents.jsonl").write_text("".join(f"{row}\n" for row in rows))
    return Examined(directory, Evaluated("a", corpus, None, None), k=2)


def completed(small_data, words):
    """The lines of a set whose documents end with so many of their words."""
    for line in (small_data.corpus.parent / "query.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield json.dumps({**row, "completion": " ".join(row["text"].split(" ")[-words:])})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "jsonl:1: not JSON"),
        ("[1]", "jsonl:1: not a JSON object"),
        ('{"completion": "end"}', 'jsonl:1: a "completion" without the "id" of its document'),
        ('{"id": "a", "completion": 3}', 'jsonl:1: "completion" is not a string'),
        ('{"id": "a", "words": "3"}', 'jsonl:1: "words" is not a whole number'),
        ('{"id": "a", "words": 3}', "counts the words of 1 documents"),
    ],
)
def test_a_line_that_says_nothing_of_use_is_named(corpus, tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        examined(tmp_path, corpus, row)


def test_other_completions_are_told_apart(small_data, corpus, tmp_path):
    found = {words: examined(tmp_path, corpus, *completed(small_data, words)).digests for words in (1, 2)}
    again = examined(tmp_path, corpus, *completed(small_data, 1)).digests
    assert found[1] == again and found[1]["completions"] != found[2]["completions"]
    assert found[1]["source"] == found[2]["source"]


def test_another_k_divides_the_text_otherwise(small_data, corpus, tmp_path):
    database = Corpus(small_data.database / "corpus")
    evaluated = Evaluated("a", corpus, NeighbourTable(small_data.neighbours), database)
    one, other = (Examined(tmp_path, evaluated, k=k).digests for k in (1, 4))
    assert one["leakage"] == other["leakage"] and one["source"] == other["source"] and one["run"] != other["run"]


def test_a_retro_with_retrieval_needs_neighbours_of_every_set(corpus, tmp_path):
    sets = {"a": examined(tmp_path, corpus)}
    retro = types.SimpleNamespace(name="retro", is_baseline=False)
    suite = Suite(tmp_path / "work", Settings(window=32, stride=16, batch_size=8, k=2), sets)
    with pytest.raises(UserError, match="a: no neighbours of this set are there, so retro cannot be evaluated ON"):
        suite.run([retro])
