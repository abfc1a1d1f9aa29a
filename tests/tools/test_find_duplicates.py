"""tools/find_duplicates.py as a user runs it, and the corpus without what it found."""

import json
import subprocess
import sys

import pytest
from small_run import ROOT, SAMPLE


def run(tool, **flags):
    command = [
        sys.executable,
        str(ROOT / "tools" / f"{tool}.py"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_duplicates_are_reported_and_left_out_of_the_corpus(small_data, tmp_path):
    records = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    valid = tmp_path / "valid.jsonl"
    valid.write_text(json.dumps({"id": "copy", "text": records[3]["text"].upper() + " the end"}) + "\n")
    (tmp_path / "titles.txt").write_text(f"= {records[0]['title']} =\n")
    result = run(
        "find_duplicates", input=SAMPLE, evaluation=valid, titles=tmp_path / "titles.txt", output=tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    assert "of 53 documents" in result.stdout and "1 (" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "removed-00000-of-00001.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [(0, "title"), (3, "near_duplicate")]
    assert lines[1]["of"] == "copy" and lines[1]["similarity"] > 0.9
    tokenizer = small_data.corpus / "tokenizer.model"
    result = run(
        "build_corpus", input=SAMPLE, tokenizer=tokenizer, output=tmp_path / "corpus", exclusions=tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    assert "51 documents" in result.stdout and "2 excluded documents left out" in result.stdout
    # The tokenizer that has not seen them either is the one of the other documents.
    (tmp_path / "rest.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for i, record in enumerate(records) if i not in (0, 3))
    )
    flags = {"vocab_size": 1000, "max_sentences": 300}
    result = run("train_tokenizer", input=SAMPLE, output=tmp_path / "a.model", exclusions=tmp_path / "out", **flags)
    assert "from 51 documents, 2 excluded documents left out" in result.stdout, result.stderr
    result = run("train_tokenizer", input=tmp_path / "rest.jsonl", output=tmp_path / "b.model", **flags)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    # What says so must be sound and for these files.
    result = run("train_tokenizer", input=valid, output=tmp_path / "c.model", exclusions=tmp_path / "out", **flags)
    assert result.returncode == 1 and "was not made for this file" in result.stderr
    shard = tmp_path / "out" / "removed-00000-of-00001.jsonl"
    shard.write_text(shard.read_text().replace('"row": 3', '"row": 4'))
    for tool in ("train_tokenizer", "build_corpus"):
        result = run(
            tool, input=SAMPLE, output=tmp_path / tool, exclusions=tmp_path / "out",
            **(flags if tool == "train_tokenizer" else {"tokenizer": tokenizer}),
        )  # fmt: skip
        assert result.returncode == 1 and "removed-00000-of-00001.jsonl: checksum differs" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "there is nothing to compare"),
        ({"evaluation": "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"titles": "absent.txt"}, "absent.txt: no such file of titles"),
        ({"evaluation": SAMPLE, "runner": "DirectRunner"}, "DirectRunner is not supported"),
        ({"evaluation": SAMPLE, "runner": "FlinkRunner", "workers": 2}, "among Beam's own options"),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    result = run("find_duplicates", input=SAMPLE, output=tmp_path / "out", **flags)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
