"""launch/sample.py as a user runs it: neighbours with their source, retrieval off, mistakes in one line."""

import json

import pytest
from serving import serving
from small_run import K, M, error_line, run_program
from tiny_bert import write_tiny_bert

from retro_jax.data.corpus import Corpus


def test_a_sample_shows_the_neighbours_of_each_complete_chunk(database, finished_run, tmp_path):
    directory, bert = database
    output = tmp_path / "sample.json"
    flags = [
        f"--workdir={finished_run}",
        "--prompt=Ein Prompt mit Ümläuten 日本 and plenty of words, so that chunks are complete",
        "--max_new_tokens=20",
        "--seed=3",
        "--max_context=128",
        f"--database={directory}",
        f"--embedder={bert}",
        f"--output={output}",
    ]
    status, stdout, stderr = run_program("launch/sample.py", *flags)
    assert status == 0, stderr
    sample = json.loads(output.read_text())
    assert stdout.startswith(sample["prompt"] + sample["continuation"])
    corpus = Corpus(directory / "corpus")
    chunks = {entry["chunk"] for entry in sample["neighbours"]}
    assert chunks == set(range(1, max(chunks) + 1)) and max(chunks) >= 3
    assert len(sample["neighbours"]) == K * len(chunks)
    for entry in sample["neighbours"]:
        assert entry["neighbour"] == corpus.text(entry["id"])
        assert entry["document"] in stdout
    again = run_program("launch/sample.py", *flags)[1]
    assert again == stdout
    assert M * max(chunks) <= 1 + 90 + 20


def test_through_the_service_the_sample_is_the_same(database, finished_run):
    directory, bert = database
    with serving(f"--database={directory}", f"--embedder={bert}", "--reload_seconds=0") as (address, _):
        flags = [f"--workdir={finished_run}", "--prompt=A prompt with plenty of words, so that chunks are complete"]
        flags += ["--max_new_tokens=10", "--seed=3"]
        status, stdout, stderr = run_program("launch/sample.py", *flags, f"--service={address}")
        assert status == 0, stderr
        local = run_program("launch/sample.py", *flags, f"--database={directory}", f"--embedder={bert}")
        assert stdout == local[1] and "neighbour 2" in stdout


def test_without_a_database_it_runs_off_and_says_so(finished_run):
    status, stdout, stderr = run_program(
        "launch/sample.py", f"--workdir={finished_run}", "--prompt=", "--max_new_tokens=4", "--temperature=0"
    )
    assert status == 0, stderr
    assert "no retrieval (OFF)" in stderr and "neighbour" not in stdout


def test_several_samples_are_told_one_below_the_other(finished_run, tmp_path):
    output = tmp_path / "samples.json"
    status, stdout, stderr = run_program(
        "launch/sample.py",
        f"--workdir={finished_run}",
        "--prompt=Some words",
        "--max_new_tokens=12",
        "--num_samples=2",
        "--stop=e",
        "--min_p=0.001",
        "--repetition_penalty=1.2",
        f"--output={output}",
    )
    assert status == 0, stderr
    first, second = (sample["continuation"] for sample in json.loads(output.read_text())["samples"])
    assert first != second and "e" not in first + second
    assert f"sample 1\nSome words{first}" in stdout and f"sample 2\nSome words{second}" in stdout


def test_a_text_is_scored_off_and_on_with_neighbours_of_ones_own(finished_run, tmp_path):
    output, own = tmp_path / "scores.json", tmp_path / "own.json"
    own.write_text(json.dumps({"1": ["a neighbour of my own"]}))
    text = "Ein Prompt mit Ümläuten and plenty of words"
    status, stdout, stderr = run_program(
        "launch/sample.py",
        f"--workdir={finished_run}",
        f"--prompt={text}",
        "--score",
        f"--neighbours={own}",
        f"--output={output}",
    )
    assert status == 0, stderr
    result = json.loads(output.read_text())
    off, on = (result["log_probabilities"][mode] for mode in ("off", "on"))
    assert len(off) == len(on) == len(result["tokens"]) and max(off + on) < 0
    # The first chunk has the start token and M - 1 others, and its neighbours come after them.
    assert off[: M - 1] == pytest.approx(on[: M - 1], abs=1e-5) and off[M - 1] != on[M - 1]
    assert [entry["neighbour"] + entry["continuation"] for entry in result["neighbours"]] == ["a neighbour of my own"]
    assert stdout.splitlines()[0] == "ln p off\tln p on\ttoken" and "neighbour 1, given" in stdout


def test_mistakes_are_named_in_one_line(database, finished_run, finished_baseline, tmp_path):
    directory, bert = database

    def mistake(*flags, workdir=finished_run):
        return error_line("launch/sample.py", f"--workdir={workdir}", "--prompt=x", *flags)

    assert "need --embedder" in mistake(f"--database={directory}")
    assert "goes without --database" in mistake(f"--database={directory}", "--service=127.0.0.1:1")
    assert "127.0.0.1:1: UNAVAILABLE" in mistake("--service=127.0.0.1:1")
    assert "top_p 0.0 must be above 0" in mistake("--top_p=0")
    assert "stop string must not be empty" in mistake("--stop=")
    assert "give one of --prompt, --prompts and --interactive" in mistake("--interactive")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "answer": "y"}\n{"prompt": 1}\n')
    workdir = f"--workdir={finished_run}"
    assert "bad.jsonl:2: expected JSON as" in error_line(
        "launch/sample.py", workdir, f"--prompts={tmp_path / 'bad.jsonl'}"
    )
    assert "--score goes with --prompt" in error_line("launch/sample.py", workdir, "--score", "--interactive")
    (tmp_path / "list.json").write_text("[1]")
    assert "expected JSON as" in mistake(f"--neighbours={tmp_path / 'list.json'}")
    assert "no such directory" in mistake(f"--database={tmp_path / 'nowhere'}", f"--embedder={bert}")
    assert "sample it without a database" in mistake(
        f"--database={directory}", f"--embedder={bert}", workdir=finished_baseline
    )
    other = write_tiny_bert(tmp_path / "other", seed=9)
    assert "embedder" in mistake(f"--database={directory}", f"--embedder={other}")
