"""Documents are chosen the same way everywhere, and evaluation sets become documents that say what is asked."""

import json

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
    (tmp_path / "bad.jsonl").write_text('{"text": "fine words"}\n{"prompt": 1}\n')
    line = error_line(
        "tools/make_evaluation_text.py", "--kind=lambada", f"--input={tmp_path / 'bad.jsonl'}", "--output=x"
    )
    assert "bad.jsonl:2: not an object with text in text" in line
