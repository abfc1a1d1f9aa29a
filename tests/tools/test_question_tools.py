"""Passages for questions and sequences of both from the command line, and one line for every mistake."""

import json

import pytest
from small_run import M, error_line, run_program
from tiny_bert import write_tiny_bert

from retro_jax.data.answer_rows import RowLayout, stored_layout
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.questions import read_questions
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index

CHUNK = 40
PASSAGE = "The {topic} of the town is kept by keeper {n} alone."
TOPICS = ("granite", "lantern", "orchard", "harbour", "violin", "glacier")


@pytest.fixture(scope="module")
def database(small_data, tmp_path_factory):
    """(directory, embedder, questions) of passages, each about a thing of its own, and questions that name it."""
    root = tmp_path_factory.mktemp("passages")
    passages = [
        {"id": f"p{n}", "title": f"Article {n // 2}", "text": PASSAGE.format(topic=topic, n=n)}
        for n, topic in enumerate(TOPICS)
    ]
    # A corpus needs a document that fills a chunk.
    passages.append({"id": "p6", "title": "Long", "text": "Nobody asks for what is said here at length. " * 9})
    (root / "passages.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    questions = [
        {
            "id": f"q{n}",
            "question": f"By whom is the {topic} kept?",
            "answers": [f"keeper {n}", f"{n}"],
            "passage_id": f"p{n}",
            "title": f"Article {n // 2}",
        }
        for n, topic in enumerate(TOPICS)
    ]
    (root / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    tokenizer = Tokenizer(small_data.corpus / "tokenizer.model")
    build_corpus([root / "passages.jsonl"], tokenizer, root / "db" / "corpus", chunk_length=CHUNK)
    bert = write_tiny_bert(root / "bert")
    embedder = Embedder.load(bert, normalize=True, max_length=32)
    embed_corpus(Corpus(root / "db" / "corpus"), embedder, root / "db" / "embeddings")
    build_index(EmbeddingSet(root / "db" / "embeddings"), root / "db" / "index")
    return root / "db", bert, root / "questions.jsonl"


def test_passages_are_found_split_by_article_and_become_sequences(small_data, database, tmp_path):
    directory, bert, questions = database
    flags = (f"--questions={questions}", f"--database={directory}", "--k=3")
    status, stdout, stderr = run_program(
        "tools/retrieve_passages.py", *flags, "--retriever=bm25", f"--output={tmp_path / 'bm25'}", "--dev_share=0.5"
    )
    assert status == 0, stderr
    manifest = json.loads((tmp_path / "bm25" / "manifest.json").read_text())
    parts = {part: list(read_questions(tmp_path / "bm25" / f"{part}.jsonl")) for part in manifest["counts"]}
    found = [question for part in parts.values() for question in part]
    assert {question.id for question in found} == {f"q{n}" for n in range(6)}
    titles = [{question.title for question in part} for part in parts.values()]
    assert sum(map(len, titles)) == len(set.union(*titles))
    for part, counts in manifest["counts"].items():
        assert counts["questions"] == len(parts[part]) and f"{part:<5}  {len(parts[part]):>9,}    3" in stdout
        assert counts["recall"]["3"] == {"passage": 1.0, "answer": 1.0}  # every question names what its passage names
        assert set(counts["recall"]) == {"1", "2", "3"}
    for question in found:
        assert len(question.passages) == 3
        right = next(passage for passage in question.passages if passage.id == question.passage_id)
        number = int(right.id[1:])
        assert right.title == question.title
        assert right.text == PASSAGE.format(topic=TOPICS[number], n=number)

    # What asks with the words of a passage has its vector, whatever the embedder thinks of words.
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["question"] = PASSAGE.format(topic=TOPICS[number], n=number)
    literal = tmp_path / "literal.jsonl"
    literal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--questions={literal}", f"--database={directory}", "--k=3")
    status, stdout, stderr = run_program(
        "tools/retrieve_passages.py", *flags, f"--embedder={bert}", f"--output={tmp_path / 'dense'}"
    )
    assert status == 0, stderr
    assert [path.name for path in (tmp_path / "dense").glob("*.jsonl")] == ["train.jsonl"]
    for question in read_questions(tmp_path / "dense" / "train.jsonl"):
        assert [question.passages[0].id, len(question.passages)] == [question.passage_id, 3]
    manifest = json.loads((tmp_path / "dense" / "manifest.json").read_text())
    assert manifest["counts"]["train"]["recall"]["1"]["passage"] == 1.0

    tokenizer = f"--tokenizer={small_data.corpus / 'tokenizer.model'}"
    layout = (
        "--prompt_chunks=4",
        "--passages=2",
        "--passages_in_prompt=1",
        f"--chunk_length={M}",
        "--neighbour_length=16",
    )
    status, stdout, stderr = run_program(
        "tools/write_answers.py",
        f"--examples={tmp_path / 'dense' / 'train.jsonl'}",
        tokenizer,
        *layout,
        f"--output={tmp_path / 'answers'}",
    )
    assert status == 0, stderr
    assert "6 questions in sequences of 40 tokens" in stdout
    assert len(SequenceSource(tmp_path / "answers")) == 6
    assert stored_layout(tmp_path / "answers") == RowLayout(4, 2, 1, M, 16)


def test_mistakes_are_named_in_one_line(small_data, database, tmp_path):
    directory, _, questions = database
    flags = (f"--questions={questions}", f"--database={directory}", f"--output={tmp_path / 'out'}")
    assert "--retriever=dense needs --embedder" in error_line("tools/retrieve_passages.py", *flags)
    bad = "dev_share 0.7 and test_share 0.7 must add up to at most 1"
    shares = ("--dev_share=0.7", "--test_share=0.7", "--retriever=bm25")
    assert bad in error_line("tools/retrieve_passages.py", *flags, *shares)
    assert "ctxs is missing" in error_line(
        "tools/write_answers.py",
        f"--examples={questions}",
        f"--tokenizer={small_data.corpus / 'tokenizer.model'}",
        f"--output={tmp_path / 'out'}",
    )
    assert not (tmp_path / "out").exists()
