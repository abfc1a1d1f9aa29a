"""launch/results.py: its programs in order on the right files, and all of it on a little text, killed and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import ROOT, SAMPLE, error_line, program, run_program
from tiny_bert import write_tiny_bert

from retro_jax.evaluation import bootstrap

# Notes its flags and leaves what the next step looks at.
STAND_IN = """
import json, sys
from pathlib import Path
here = Path(__file__).resolve()
flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in sys.argv[1:])
with open(here.parent.parent / "calls", "a") as calls:
    print(json.dumps([here.stem, flags]), file=calls)
output = Path(flags.get("output") or flags["workdir"])
if here.stem == "build_corpus":
    output.mkdir(parents=True, exist_ok=True)
    counts = {"documents": 3, "bytes": 1000, "chunks": 7}
    manifest = {"stage": "corpus", "settings": {}, "inputs": {}, "counts": counts, "shards": [], "format_version": 1}
    (output / "manifest.json").write_text(json.dumps(manifest))
elif here.stem == "evaluate":
    output.mkdir(parents=True, exist_ok=True)
    rows = [{"label": name, "completions": {"natural": {"accuracy": 0.5}}} for name in ("baseline", "retro-on")]
    differences = [{"part": "source", "name": "books", "units": 2}]
    results = {"sets": [{"name": "x", "rows": rows, "differences": differences}]}
    (output / "results.json").write_text(json.dumps(results))
    (output / "results.md").write_text("# Evaluation\\n\\nfigures\\n")
elif output.suffix == ".jsonl":
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("{}\\n")
"""


def write_lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_text(folder: Path) -> None:
    """A folder of text as the program wants it, out of the sample; two files of everything that may be several."""
    documents = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    documents = [document for document in documents if document["language"] == "en"]
    valid = documents[::4]
    train = [document for document in documents if document not in valid]
    copies = [{**one, "id": f"copy-{one['id']}", "text": one["text"][200:], "train_id": one["id"]} for one in train[:6]]
    for number in range(2):
        write_lines(folder / "corpus" / f"train-{number}.jsonl", train[number::2])
        write_lines(folder / "corpus" / f"redundant-{number}.jsonl", copies[number::2])
        words = train[number]["text"].split()
        passages = [{"text": " ".join(words[place : place + 20])} for place in range(0, 200, 20)]
        write_lines(folder / "lambada" / f"part-{number}.jsonl", passages)
    write_lines(folder / "corpus" / "valid-0.jsonl", valid)
    (folder / "wikitext").mkdir()
    articles = [
        f" \n = Article {number} = \n \n {one['text'][:800].split()} \n" for number, one in enumerate(valid[:4])
    ]
    (folder / "wikitext" / "valid.txt").write_text("".join(articles), encoding="utf-8")


def test_mistakes_are_named_before_anything_is_made(tmp_path):
    flags = (f"--data={tmp_path}", f"--workdir={tmp_path / 'work'}", "--size=trial")
    assert "corpus/train-*.jsonl.gz: no such file; `--help` says" in error_line("launch/results.py", *flags)
    write_text(tmp_path)
    line = error_line("launch/results.py", *flags, f"--publish={tmp_path / 'work' / 'page'}")
    assert "publishing would replace what is in" in line and not (tmp_path / "work").exists()


def test_every_program_gets_its_files_and_what_comes_of_it_is_published(tmp_path):
    write_text(tmp_path / "text")
    checkout = tmp_path / "checkout"
    for name in ("tools", "launch"):
        (checkout / name).mkdir(parents=True)
        for path in (ROOT / name).glob("*.py"):
            (checkout / name / path.name).write_text(STAND_IN)
    shutil.copy(ROOT / "launch" / "results.py", checkout / "launch")
    command = [sys.executable, "launch/results.py", f"--data={tmp_path / 'text'}", "--size=small", "--publish=page"]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    calls = [json.loads(line) for line in (checkout / "calls").read_text().splitlines()]
    text = tmp_path / "text"
    redundant = f"{text}/corpus/redundant-0.jsonl,{text}/corpus/redundant-1.jsonl"
    chosen = [flags for name, flags in calls if name == "select_documents"]
    assert chosen[0]["input"] == f"{text}/corpus/train-0.jsonl,{text}/corpus/train-1.jsonl"
    assert chosen[0]["always"] == chosen[2]["input"] == redundant
    assert "factbook" in chosen[0]["domains"] and chosen[1]["domains"] == chosen[0]["domains"] + ",enwiki-core"
    made = {flags["kind"]: flags["input"] for name, flags in calls if name == "make_evaluation_text"}
    assert made["lambada"] == f"{text}/lambada/part-0.jsonl,{text}/lambada/part-1.jsonl"
    corpora = {flags["output"]: flags["input"] for name, flags in calls if name == "build_corpus"}
    assert corpora["results/database/corpus"] == "results/database/documents-*-of-00009.jsonl"
    assert chosen[0]["files"] == "9" and chosen[0]["output"] == "results/database/documents.jsonl"
    # Questions and register are read where they are made, so that one cannot be of other people than the other.
    assert corpora["results/planted/register/corpus"] == "results/planted/text/register.jsonl"
    assert made["questions"] == "results/planted/text/questions.jsonl"
    assert sorted(path.name for path in (checkout / "page").iterdir()) == [
        "README.md",
        "planted",
        "provenance.json",
        "text",
    ]
    page = (checkout / "page" / "README.md").read_text()
    assert "- planted values right, retro-on: 50.0 %" in page and "x, books (2)." in page
    assert "same 3 documents of\n1,000 bytes" in page and "python launch/results.py --data=FOLDER" in page
    provenance = json.loads((checkout / "page" / "provenance.json").read_text())
    assert len(provenance["stages"]) == len(calls) and str(tmp_path) not in json.dumps(provenance)
    assert {"corpus/train-0.jsonl", "wikitext/valid.txt", "results/valid/documents.jsonl"} <= provenance["text"].keys()
    assert set(provenance["seeds"].values()) == {0} and provenance["seeds"]["bootstrap"] == bootstrap._SEED
    seeded = [flags for name, flags in calls if name in ("train_tokenizer", "write_sequences", "make_planted_text")]
    assert len(seeded) == 5 and all(flags["seed"] == "0" for flags in seeded)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_results_of_a_little_text_are_the_same_after_a_kill(tmp_path):
    write_text(tmp_path / "text")
    bert = write_tiny_bert(tmp_path / "bert", max_position_embeddings=256)
    common = [f"--data={tmp_path / 'text'}", f"--embedder={bert}", "--size=trial"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*common, f"--workdir={whole}", f"--publish={tmp_path / 'page'}"]
    status, stdout, stderr = run_program("launch/results.py", *flags, timeout=1800)
    assert status == 0, stderr[-3000:]
    assert "planted values right, retro-on: " in stdout

    flags = [*common, f"--workdir={killed}"]
    process = program("launch/results.py", *flags)
    deadline = time.monotonic() + 1800
    while not (killed / "retro" / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    status, _, stderr = run_program("launch/results.py", *flags, timeout=1800)
    assert status == 0, stderr[-3000:]
    for report in ("report", "planted/report"):
        one, other = (json.loads((work / report / "results.json").read_text()) for work in (whole, killed))
        assert one["sets"] == other["sets"] and one["sweeps"] == other["sweeps"]
    assert [entry["name"] for entry in json.loads((whole / "report" / "results.json").read_text())["sets"]] == [
        "valid",
        "redundant",
        "wikitext",
        "lambada",
    ]
    page, provenance = (tmp_path / "page" / name for name in ("README.md", "provenance.json"))
    assert "](text/plots/gain.svg)" in page.read_text() and str(tmp_path) not in page.read_text()
    assert "valid, books (" in page.read_text()
    told = json.loads(provenance.read_text())
    stages = [record["stage"] for record in json.loads((killed / "stages.json").read_text())]
    assert [stage["stage"] for stage in told["stages"]] == stages
    assert sum(path.stat().st_size for path in (tmp_path / "page").rglob("*.*")) < 3_000_000
