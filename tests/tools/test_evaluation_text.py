"""Documents are chosen the same way everywhere, and evaluation sets become documents that say what is asked."""

import gzip
import json

import pytest
import zstandard
from small_run import SAMPLE, error_line, run_program


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_chosen_documents_are_shared_out_evenly_and_named_ones_are_always_there(tmp_path):
    documents = lines(SAMPLE)
    named = [document for document in documents if document["source"] == "books"][:1]
    (tmp_path / "copies.jsonl").write_text(json.dumps({"train_id": named[0]["id"]}) + "\n")
    (tmp_path / "reversed.jsonl").write_text("".join(json.dumps(one) + "\n" for one in reversed(documents)))
    for source, output in ((SAMPLE, "a"), (tmp_path / "reversed.jsonl", "b")):
        status, _, stderr = run_program(
            "tools/select_documents.py",
            f"--input={source}",
            "--bytes=60000",
            "--max_characters=4000",
            f"--always={tmp_path / 'copies.jsonl'}",
            f"--output={tmp_path / output}.jsonl",
        )
        assert status == 0, stderr
    chosen = lines(tmp_path / "a.jsonl")
    assert chosen == lines(tmp_path / "b.jsonl")
    assert named[0]["id"] in {one["id"] for one in chosen}
    texts = {one["id"]: one["text"] for one in documents}
    assert all(texts[one["id"]].startswith(one["text"]) and len(one["text"]) <= 4000 for one in chosen)
    sizes = {}
    for one in chosen:
        sizes[one["source"]] = sizes.get(one["source"], 0) + len(one["text"].encode())
    assert 60_000 <= sum(sizes.values()) <= 65_000 and len(sizes) == len({one["source"] for one in documents})
    assert max(sizes.values()) - min(sizes.values()) <= 5_000


def test_passages_become_documents_with_their_last_word_asked_for(tmp_path):
    passages = [{"text": f'They said: "number {number}", and so it was called {number}'} for number in range(5)]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps(one) + "\n" for one in passages))
    flags = ("--kind=lambada", f"--input={tmp_path / 'lambada.jsonl'}", "--documents=3")
    status, stdout, stderr = run_program("tools/make_evaluation_text.py", *flags, f"--output={tmp_path / 'out.jsonl'}")
    assert status == 0 and "3 documents" in stdout, stderr
    for row in lines(tmp_path / "out.jsonl"):
        assert row["text"] == passages[int(row["completion"])]["text"]


def test_named_documents_may_stand_in_several_files_and_the_chosen_ones_are_dealt_to_several(tmp_path):
    ids = [document["id"] for document in lines(SAMPLE)]
    first, second = (json.dumps({"train_id": identity}).encode() + b"\n" for identity in ids[:2])
    (tmp_path / "a.jsonl").write_bytes(b"\n" + first + b"\n")
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(second))
    flags = (f"--input={SAMPLE}", "--domains=peps", f"--always={tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl.zst'}")
    for more in (("--output=" + str(tmp_path / "one.jsonl"),), ("--files=3", "--output=" + str(tmp_path / "x.jsonl"))):
        status, stdout, stderr = run_program("tools/select_documents.py", *flags, *more)
        assert status == 0, stderr
    assert "x.jsonl: 6 documents" in stdout and stdout.endswith("in 3 files\n")
    whole = lines(tmp_path / "one.jsonl")
    assert {ids[0], ids[1]} <= {one["id"] for one in whole} and len(whole) == 6
    for number in range(3):
        assert lines(tmp_path / f"x-{number:05d}-of-00003.jsonl") == whole[number::3]
    (tmp_path / "a.jsonl").write_bytes(first + b"[1]\n")
    line = error_line("tools/select_documents.py", *flags, f"--output={tmp_path / 'x'}")
    assert "a.jsonl:2: not an object with a train_id" in line
    line = error_line("tools/select_documents.py", f"--input={SAMPLE}", "--domains=none", f"--output={tmp_path / 'x'}")
    assert "no document of these languages and domains" in line


def make(tmp_path, kind, content, name):
    """The documents that the tool makes of a file with this content."""
    (tmp_path / name).write_bytes(content)
    flags = (f"--kind={kind}", f"--input={tmp_path / name}", f"--output={tmp_path / 'out.jsonl'}")
    status, _, stderr = run_program("tools/make_evaluation_text.py", *flags)
    assert status == 0, stderr
    return lines(tmp_path / "out.jsonl")


def test_wikitext_becomes_its_articles_with_the_words_of_the_original(tmp_path):
    text = " \n = First = \n \n It has 1 @,@ 234 words , says Ø. \n \n = Second = \n \n Short . \n"
    rows = make(tmp_path, "wikitext", gzip.compress(text.replace("\n", "\r\n").encode()), "wiki.valid.raw.gz")
    assert rows == [
        {
            "id": "wiki.valid-0000",
            "source": "wikitext",
            "title": "First",
            "text": "First\n\nIt has 1,234 words, says Ø.",
            "words": 17,
        },
        {"id": "wiki.valid-0001", "source": "wikitext", "title": "Second", "text": "Second\n\nShort.", "words": 8},
    ]


def test_articles_with_summaries_ask_for_the_summary_alone(tmp_path):
    row = {"article": "Long ago.", "summary": "Past."}
    mark = b"\xef\xbb\xbf"
    (found,) = make(tmp_path, "summaries", mark + json.dumps(row).encode() + b"\n\n", "some.jsonl")
    assert found["text"] == "Long ago.\n\nTL;DR: Past." and found["completion"] == "Past."
    assert (found["id"], found["source"]) == ("some:1", "summaries")


def test_passages_of_several_files_are_taken_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"the end of {name}"}) + "\n")
    flags = ("--kind=lambada", f"--input={tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}", f"--output={tmp_path / 'out'}")
    status, _, stderr = run_program("tools/make_evaluation_text.py", *flags)
    assert status == 0, stderr
    assert [(one["id"], one["completion"]) for one in lines(tmp_path / "out")] == [("a:1", "a"), ("b:1", "b")]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("lambada", b'{"text": "fine words"}\n{"prompt": 1}\n', "bad.jsonl:2: not an object with text in text"),
        (
            "questions",
            b'{"prompt": "Who?", "answer": ["a"]}',
            "bad.jsonl:1: not an object with text in prompt and answer",
        ),
        ("questions", b'\n{"prompt": "Who?", "answer": "\\ud800"}', "bad.jsonl:2: not an object with text in prompt"),
        ("summaries", b'{"article": "caf\xe9", "summary": "x"}', "bad.jsonl:1: not an object with text in article"),
        ("wikitext", b" = Caf\xe9 = \n", "bad.jsonl:1: not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, kind, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    flags = (f"--kind={kind}", f"--input={tmp_path / 'bad.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    assert message in error_line("tools/make_evaluation_text.py", *flags)
    assert not (tmp_path / "out.jsonl").exists()
