"""Questions in Fusion-in-Decoder's format are read as they stand; what is wrong is told in one line."""

import gzip
import json

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.data.questions import PARTS, Passage, Question, part_of, read_questions, some_of
from retro_jax.errors import UserError

GOOD = {"question": "Who?", "answers": ["Ann", "Bob"], "ctxs": [{"title": "T", "text": "Ann."}]}


def write(path, rows, as_list=False):
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(("name", "as_list"), [("q.jsonl", False), ("q.json", True), ("q.jsonl.gz", False)])
def test_lines_and_lists_plain_and_gzipped_are_read_alike(tmp_path, name, as_list):
    rows = [GOOD, {**GOOD, "id": "x", "target": "Ann", "title": "A", "passage_id": "p", "ctxs": []}]
    found = list(read_questions(write(tmp_path / name, rows, as_list)))
    first = Question("0", "Who?", ("Ann", "Bob"), None, (Passage("T", "Ann."),))
    assert found == [first, Question("x", "Who?", ("Ann", "Bob"), "Ann", (), "A", "p")]


def test_what_is_written_is_read_again(tmp_path):
    (numbered,) = read_questions(write(tmp_path / "q.jsonl", [{**GOOD, "id": 7, "title": None}]))
    assert (numbered.id, numbered.title) == ("7", "")
    question = Question("7", "Wer?", ("Åse",), "Åse", (Passage("T", "x", "p1"), Passage("", "y")), "Titel", "p1")
    assert list(read_questions(write(tmp_path / "q.jsonl", [question.as_json()]))) == [question]


def test_a_target_alone_is_the_answer_and_answers_are_drawn_by_seed_and_number(tmp_path):
    (alone,) = read_questions(write(tmp_path / "q.jsonl", [{"question": "Q", "target": "T", "ctxs": []}]))
    assert alone.answers == ("T",) and alone.training_answer(0, 0) == "T"
    several = Question("0", "Q", ("a", "b", "c"))
    drawn = [several.training_answer(5, number) for number in range(40)]
    assert set(drawn) == {"a", "b", "c"} and drawn == [several.training_answer(5, number) for number in range(40)]
    assert drawn != [several.training_answer(6, number) for number in range(40)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected an object with question, answers and ctxs"),
        ({**GOOD, "question": None}, "question is not a string"),
        ({"answers": ["a"], "ctxs": []}, "question is missing"),
        ({**GOOD, "question": " \n"}, "the question is empty"),
        ({"question": "Q", "ctxs": []}, "there is no answer"),
        ({**GOOD, "answers": []}, "there is no answer"),
        ({**GOOD, "answers": [" "]}, "there is no answer"),
        ({**GOOD, "answers": "Ann"}, "answers is not a list of strings"),
        ({"question": "Q", "answers": ["a"]}, "ctxs is missing or not a list; tools/retrieve_passages.py finds"),
        ({**GOOD, "ctxs": [{"title": "T"}]}, "passage 1 of ctxs: text is missing"),
        ({**GOOD, "ctxs": [GOOD["ctxs"][0], "T"]}, "passage 2 of ctxs is no object"),
        ({**GOOD, "question": "\ud800"}, "question holds a lone surrogate"),
        ({**GOOD, "answers": ["Ann", "\ud800"]}, "answers holds a lone surrogate"),
        ({**GOOD, "title": "\ud800"}, "title holds a lone surrogate"),
        ({**GOOD, "passage_id": "\ud800"}, "passage_id holds a lone surrogate"),
        ({**GOOD, "id": "\ud800"}, "id holds a lone surrogate"),
        ({**GOOD, "id": ["\ud800"]}, "id is neither a string nor a number"),
        ({**GOOD, "ctxs": [{**GOOD["ctxs"][0], "id": "\ud800"}]}, "passage 1 of ctxs: id holds a lone surrogate"),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_bad_question_is_named_in_one_line(tmp_path, row, message, as_list):
    path = write(tmp_path / "q.json", [GOOD, row], as_list)
    with pytest.raises(UserError) as error:
        list(read_questions(path))
    assert str(error.value).startswith(f"{path}: question 2: " if as_list else f"{path}:2: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "there is no question in it"),
        (b"[]", "there is no question in it"),
        (b'{"question"\n', "q.jsonl:1: not JSON"),
        (b"[1,\n", "q.jsonl: not JSON"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, data, message):
    path = tmp_path / "q.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_questions(path))


def test_a_damaged_or_missing_file_is_named_in_one_line(tmp_path):
    path = tmp_path / "q.jsonl.gz"
    with pytest.raises(UserError, match=f"{path}: no such file"):
        list(read_questions(path))
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    for damaged in (whole[:20], whole[:30] + b"\xff" * 9 + whole[39:], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path}:1: the compressed file is damaged from here on"):
            list(read_questions(path))
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"deep\.jsonl: not JSON"):
        list(read_questions(tmp_path / "deep.jsonl"))


def test_a_byte_order_mark_and_zstandard_are_read(tmp_path):
    line = b"\xef\xbb\xbf" + json.dumps(GOOD).encode()
    (tmp_path / "q.jsonl").write_bytes(line)
    (tmp_path / "q.jsonl.zst").write_bytes(zstandard.compress(line))
    first, second = (list(read_questions(tmp_path / name)) for name in ("q.jsonl", "q.jsonl.zst"))
    assert first == second and first[0].question == GOOD["question"]


@given(st.text(min_size=1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_all_questions_about_an_article_are_in_one_part(title, dev, test):
    parts = {part_of(Question(str(i), f"q{i}", ("a",), title=title), dev_share=dev, test_share=test) for i in range(3)}
    assert len(parts) == 1 and parts < set(PARTS)


def test_parts_have_about_their_shares_of_the_articles():
    questions = [Question(str(i), "q", ("a",), title=f"article {i}") for i in range(2000)]
    parts = [part_of(question, dev_share=0.1, test_share=0.2) for question in questions]
    shares = [parts.count(part) / len(parts) for part in PARTS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    assert {part_of(question, dev_share=0, test_share=0) for question in questions} == {"train"}


def test_some_questions_come_from_all_articles_in_order_and_are_always_the_same():
    questions = [
        Question(f"{article}-{n}", "Why?", ("x",), title=f"{article}") for article in range(6) for n in range(50)
    ]
    some = some_of(questions, 60)
    assert len(some) == 60 and {question.title for question in some} == {str(article) for article in range(6)}
    assert some == [question for question in questions if question in some]
    assert set(some) == set(some_of(questions[::-1], 60))  # whatever the order
    assert some_of(questions, 1000) == questions
