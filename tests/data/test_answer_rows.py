"""The prompt of a question ends with a chunk whatever its length, and its passages are neighbours of that chunk."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import SAMPLE

from retro_jax.data.answer_rows import RowLayout, RowWriter, stored_layout, write_answers
from retro_jax.data.questions import Passage, Question
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, train_tokenizer
from retro_jax.errors import UserError

M, R, VOCAB = 16, 24, 640
TEXT = next(iter(read_documents([SAMPLE]))).text.split()
PASSAGES = tuple(Passage(f"Title {i}", " ".join(TEXT[7 * i : 7 * i + 30]), str(i)) for i in range(4))
LAYOUTS = {
    "closed book": RowLayout(1, 0, 0, M, R),
    "neighbours": RowLayout(1, 3, 0, M, R),
    "one in the prompt": RowLayout(4, 2, 1, M, R),
    "all in the prompt": RowLayout(6, 0, 4, M, R),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([document.text for document in read_documents([SAMPLE])], path, vocab_size=VOCAB)


def question(words, answer="an answer", passages=PASSAGES):
    return Question("0", " ".join(TEXT[:words]), (answer,), passages=passages)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(words=st.integers(1, 60), answer=st.integers(1, 30), passages=st.integers(0, 4))
def test_answer_colon_ends_the_last_chunk_of_the_prompt_and_the_answer_begins_the_next(
    tokenizer, name, words, answer, passages
):
    layout = LAYOUTS[name]
    writer = RowWriter(tokenizer, layout)
    asked = question(words, " ".join(TEXT[:answer]), PASSAGES[:passages])
    row, P = writer.row(asked, asked.answers[0]), layout.prompt_length
    assert row.shape == (P + M + 1,) and P % M == 0
    prompt, completion = row[:P], row[P:]
    pad = int((prompt == PAD_ID).sum())
    assert (prompt[:pad] == PAD_ID).all() and prompt[pad] == BOS_ID  # padding is at the left, and nowhere else
    assert not np.isin(prompt[pad + 1 :], (PAD_ID, BOS_ID, EOS_ID)).any()
    text = tokenizer.decode(prompt[pad + 1 :])
    whole = f"question: {asked.question} \n answer:"
    assert whole.endswith(text) or text.endswith(whole)
    assert text.endswith("answer:") and (text.endswith(whole) or writer.is_cut(asked))
    assert writer.is_cut(asked) == (len(tokenizer.encode(whole)) > P - 1)
    expected = [*tokenizer.encode(f" {asked.answers[0]}"), EOS_ID][:M]
    assert completion[: len(expected)].tolist() == expected
    assert (completion[len(expected) :] == PAD_ID).all()


def test_passages_are_cut_to_a_neighbour_and_missing_ones_are_padding(tokenizer):
    writer = RowWriter(tokenizer, LAYOUTS["neighbours"])
    asked = question(3, passages=(PASSAGES[0], Passage("T", "x")))
    rows = writer.neighbour_rows(asked)
    assert rows.shape == (3, R)
    whole = tokenizer.encode(f"title: Title 0, source: {PASSAGES[0].text}")
    assert len(whole) > R and rows[0].tolist() == whole[:R]
    assert tokenizer.decode(rows[1]) == "title: T, source: x"
    assert (rows[2] == PAD_ID).all()


def test_passages_in_the_prompt_stand_before_the_question_the_best_last_and_are_no_neighbours(tokenizer):
    writer = RowWriter(tokenizer, LAYOUTS["one in the prompt"])
    asked = question(3)
    first, second, third, _ = (tokenizer.encode(f"title: {p.title}, source: {p.text}")[:R] for p in PASSAGES)
    tail = tokenizer.encode(f"question: {asked.question} \n answer:")
    assert writer.prompt(asked) == [*first, *tokenizer.encode(" \n "), *tail]
    assert writer.neighbours(asked) == [second, third]
    text = tokenizer.decode(RowWriter(tokenizer, LAYOUTS["all in the prompt"]).prompt(asked))
    places = [text.find(f"Title {number}") for number in range(4)]
    assert 0 <= places[1] < places[0] < text.find("question:")


def test_passages_take_the_room_that_the_question_leaves(tokenizer):
    layout = LAYOUTS["all in the prompt"]
    writer = RowWriter(tokenizer, layout)
    full = writer.prompt(question(10))
    assert len(full) == layout.prompt_length - 1  # the last passage is cut, so that nothing is left over
    separator = len(tokenizer.encode(" \n "))
    tail = len(tokenizer.encode(f"question: {question(10).question} \n answer:"))
    fitting = (layout.prompt_length - 1 - tail) // (R + separator)
    assert tokenizer.decode(full).count("title: Title") == fitting + 1 < 4
    assert len(writer.passages_in_prompt(question(10))) == fitting + 1
    long = writer.prompt(question(400))
    assert len(long) == layout.prompt_length - 1 and "title:" not in tokenizer.decode(long)


def write(path, questions):
    path.write_text("".join(json.dumps(each.as_json()) + "\n" for each in questions))
    return path


def test_sequences_hold_rows_and_neighbours_and_say_how_long_the_prompt_is(tokenizer, tmp_path):
    layout = LAYOUTS["one in the prompt"]
    asked = [question(words, passages=PASSAGES[: words % 4]) for words in range(1, 12)]
    several = Question("s", "Which?", ("red", "green", "blue"))
    path = write(tmp_path / "q.jsonl", [*asked, *[several] * 9])
    manifest = write_answers(path, tokenizer, tmp_path / "out", layout, seed=3, shard_records=8)
    source, writer = SequenceSource(tmp_path / "out"), RowWriter(tokenizer, layout)
    assert (len(source), source.prompt_length, source.schema) == (20, 4 * M, layout.schema(VOCAB))
    assert source.tokenizer_fingerprint == tokenizer.fingerprint and stored_layout(tmp_path / "out") == layout
    for number, each in enumerate(asked):
        example = source[number]
        np.testing.assert_array_equal(example["tokens"], writer.row(each, "an answer"))
        np.testing.assert_array_equal(example["neighbours"][3], writer.neighbour_rows(each))
        assert (np.delete(example["neighbours"], 3, axis=0) == PAD_ID).all()
    drawn = {tokenizer.decode(source[number]["tokens"][4 * M :]).strip() for number in range(11, 20)}
    assert drawn == {"red", "green", "blue"}
    counts = manifest.counts
    assert counts["sequences"] == 20 and sum(counts["questions_by_passages"]) == 20
    assert counts["passages_in_prompts"] == sum(words % 4 > 0 for words in range(1, 12))
    assert counts["tokens"] == sum(int((source[i]["tokens"][:-1] != PAD_ID).sum()) for i in range(20))
    again = write_answers(path, tokenizer, tmp_path / "again", layout, seed=3, shard_records=8)
    assert again.fingerprint == manifest.fingerprint
    other = write_answers(path, tokenizer, tmp_path / "other", layout, seed=4, shard_records=8)
    assert other.fingerprint != manifest.fingerprint
    with pytest.raises(UserError, match=r"was made with settings\.seed = 3, now it is 4"):
        write_answers(path, tokenizer, tmp_path / "out", layout, seed=4, shard_records=8)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "q.jsonl", [question(words) for words in range(1, 10)])
    layout = LAYOUTS["neighbours"]
    whole = write_answers(path, tokenizer, tmp_path / "whole", layout, shard_records=4)
    rows = RowWriter.row
    asked = []

    def row(self, question, answer):
        asked.append(question)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return rows(self, question, answer)

    monkeypatch.setattr(RowWriter, "row", row)
    with pytest.raises(KeyboardInterrupt):
        write_answers(path, tokenizer, tmp_path / "cut", layout, shard_records=4)
    resumed = write_answers(path, tokenizer, tmp_path / "cut", layout, shard_records=4)
    assert resumed == whole and len(asked) == 6 + 5  # the first shard was there


def test_layouts_that_cannot_be_are_refused():
    for changes, message in (
        ({"prompt_chunks": 0}, "prompt_chunks must be at least 1"),
        ({"passages": -1}, "passages must not be negative"),
        ({"chunk_length": 1}, "chunk_length must be at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            RowLayout(**changes)
