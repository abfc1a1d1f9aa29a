"""launch/evaluate.py as a user runs it."""

import json

import pytest
from small_run import error_line, run_program

from retro_jax.data.corpus import build_corpus
from retro_jax.data.tokenizer import train_tokenizer
from retro_jax.training.metrics import read_metrics


def inputs(small_data):
    return [
        f"--corpus={small_data.corpus}",
        f"--neighbours={small_data.neighbours}",
        f"--database={small_data.database}",
    ]


def test_the_table_has_baseline_off_on_and_shuffled(small_data, finished_run, finished_baseline, tmp_path):
    output = tmp_path / "bpb.json"
    status, stdout, stderr = run_program(
        "launch/evaluate.py",
        f"--workdir={finished_baseline},{finished_run}",
        *inputs(small_data),
        f"--output={output}",
        "--group_by=source",
    )
    assert status == 0, stderr
    results = json.loads(output.read_text())["results"]
    assert [result["mode"] for result in results] == ["baseline", "off", "on", "shuffled"]
    assert len({result["bytes"] for result in results}) == 1
    for result in results:
        assert f"{result['bits_per_byte']:.4f}" in stdout
        assert sum(group["nats"] for group in result["groups"].values()) == pytest.approx(result["nats"])
        assert (result["window"], result["stride"]) == (32, 16)
    assert "+0.0 %" in stdout
    assert read_metrics(finished_run)[-1]["step"] == results[1]["step"] == 40


def test_mistakes_are_named_in_one_line(small_data, finished_run, tmp_path):
    def mistake(*flags):
        return error_line("launch/evaluate.py", *flags)

    corpus = f"--corpus={small_data.corpus}"
    assert "no config.json, so no run is here" in mistake(f"--workdir={tmp_path}", corpus)
    assert "needs --neighbours and --database" in mistake(f"--workdir={finished_run}", corpus)
    assert "no such directory" in mistake(f"--workdir={finished_run}", f"--corpus={tmp_path / 'nowhere'}")
    assert "'onn' is none of off, on, shuffled" in mistake(f"--workdir={finished_run}", corpus, "--modes=onn")
    assert "must be multiples of the chunk length 8" in mistake(
        f"--workdir={finished_run}", corpus, "--modes=off", "--window=30"
    )
    assert "--group_by: 'sourc' is none of" in mistake(f"--workdir={finished_run}", corpus, "--group_by=sourc")
    assert "must not be empty" in mistake(f"--workdir={finished_run}", corpus, "--modes=")
    assert "no checkpoint of step 3; there are 30, 40" in mistake(f"--workdir={finished_run}", corpus, "--step=3")


def test_a_corpus_of_another_tokenizer_is_refused(small_data, finished_run, tmp_path):
    tokenizer = train_tokenizer(["some other text, 0123456789 " * 50], tmp_path / "other.model", vocab_size=283)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some text " * 20}))
    build_corpus([tmp_path / "a.jsonl"], tokenizer, tmp_path / "corpus", chunk_length=8)
    line = error_line(
        "launch/evaluate.py", f"--workdir={finished_run}", f"--corpus={tmp_path / 'corpus'}", "--modes=off"
    )
    assert f"was made with tokenizer {tokenizer.fingerprint}" in line and "build it again" in line
