"""The chain of question answering from text to table, and the commands of its page."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from small_run import MODEL, ROOT, SAMPLE, error_line, run_program, run_script

from retro_jax.config import CheckpointConfig, RetroConfig, TrainConfig, to_dict
from retro_jax.data.text import read_documents
from retro_jax.model import abstract_parameters
from retro_jax.training.checkpoint import Checkpoints
from retro_jax.training.health import healthy
from retro_jax.training.state import TrainState

ARMS = ("baseline, closed book", "RETRO[OFF], closed book", "RETRO[ON]", "RETRO++", "baseline, reading")


def write_set(folder: Path, name: str = "small") -> None:
    """Passages out of the sample, and for each a question about a word that follows another."""
    passages, questions = [], []
    for number, document in enumerate(read_documents([SAMPLE])):
        text = document.text[:1500]
        words = text.split()
        identity, title = f"p{number}", f"Article {number}"
        passages.append({"id": identity, "title": title, "text": text})
        questions.append(
            {
                "question": f"What follows {words[10]} {words[11]}?",
                "answers": [words[12]],
                "passage_id": identity,
                "title": title,
            }
        )
    for kind, rows in (("passages", passages), ("questions", questions)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.{kind}.jsonl").write_text(lines, encoding="utf-8")


def write_untrained(workdir: Path, model: RetroConfig) -> None:
    """A run with zeros as the parameters of its only checkpoint."""
    workdir.mkdir()
    (workdir / "tokenizer.model").write_bytes(b"")
    (workdir / "config.json").write_text(json.dumps(to_dict(TrainConfig(model=model))))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_parameters(model))
    with Checkpoints(workdir / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, TrainState(jnp.zeros((), jnp.int32), params, (), healthy()), {})


def test_inputs_that_are_not_there_are_named_in_one_line(tmp_path):
    def mistake(*flags):
        flags = (f"--data={tmp_path}", f"--workdir={tmp_path / 'work'}", "--size=trial", *flags)
        return error_line("launch/question_answering.py", *flags)

    assert "NAME.passages.jsonl.gz: no such file; `--help` says what is needed" in mistake()
    write_set(tmp_path)
    write_set(tmp_path, "other")
    line = mistake()
    assert "--set names one of the sets in" in line and line.endswith(": other, small")
    missing = ("--set=small", f"--retro={tmp_path}", f"--baseline={tmp_path}")
    assert "tokenizer.model: no such file; --retro and --baseline name" in mistake(*missing)
    for run, layers in (("retro", MODEL.cca_layers), ("baseline", ())):
        write_untrained(tmp_path / run, dataclasses.replace(MODEL, cca_layers=layers))
    for retro, baseline, wrong in (("retro", "retro", "--baseline"), ("baseline", "baseline", "--retro")):
        line = mistake("--set=small", f"--retro={tmp_path / retro}", f"--baseline={tmp_path / baseline}")
        assert f"{wrong}={tmp_path / retro}: this model is a {'RETRO' if retro == 'retro' else 'baseline'}" in line
    line = mistake("--set=small", f"--retro={tmp_path / 'retro'}", f"--baseline={tmp_path / 'baseline'}")
    assert "this model has chunks of 8 tokens and neighbours of 16, here they have 64 and 128" in line
    (tmp_path / "small.questions.jsonl").unlink()
    assert "small.questions.jsonl: no such file" in mistake("--set=small")


@pytest.mark.slow
def test_every_arm_is_in_the_table_and_the_commands_of_the_page_work(tmp_path, embedder_directory):
    write_set(tmp_path)
    work = tmp_path / "work"
    flags = (f"--data={tmp_path}", f"--workdir={work}", "--size=trial")
    status, stdout, stderr = run_program("launch/question_answering.py", *flags, timeout=1800)
    assert status == 0, stderr[-3000:]
    table = (work / "results.md").read_text()
    assert table in stdout and "| bm25 |" in table
    names = re.findall(r"^\| (.+?) +\| \d+ +\| (?:baseline|off|on) ", table, re.MULTILINE)
    assert tuple(names) == ARMS
    status, again, _ = run_program("launch/question_answering.py", *flags, timeout=1800)
    assert status == 0 and table in again
    assert "[tokenizer]" in stdout and "[tokenizer]" not in again
    # Answers are of the models that they were given by.
    (tmp_path / "other").symlink_to(work / "baseline")
    other = (f"--retro={work / 'runs' / 'on'}", f"--baseline={tmp_path / 'other'}")
    status, stdout, stderr = run_program("launch/question_answering.py", *flags, *other, timeout=1800)
    assert status == 1 and "began with another model" in stderr and table not in stdout

    for name in ("tools", "launch", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "embedder").symlink_to(embedder_directory)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "retro").symlink_to(work / "retro")
    for kind in ("passages", "questions"):
        (tmp_path / f"{kind}.jsonl").symlink_to(tmp_path / f"small.{kind}.jsonl")
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "question-answering.md").read_text(), re.DOTALL)
    script = script.replace("question_answering.py:small", "question_answering.py:trial").replace("400", "20")
    stdout = run_script(script, tmp_path)
    assert "most exact matches at step" in stdout
    assert len(json.loads((tmp_path / "answers.json").read_text())["results"]) == 1
