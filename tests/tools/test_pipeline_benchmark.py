"""The benchmark of the whole pipeline, on a few documents."""

import json
import sys
from pathlib import Path

import pytest
import tiny_bert
from small_run import ROOT, SAMPLE, error_line, run_program

from retro_jax.data.sequences import SequenceSource
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import train_tokenizer
from retro_jax.errors import UserError

sys.path.insert(0, str(ROOT / "tools"))
from benchmarks import pipeline

STAGES = ["find_duplicates", "build_corpus", "embed_chunks", "build_index", "find_neighbours", "write_sequences"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Path, list[dict]]:
    """(directory that the pipeline wrote, its lines) of twelve documents, of which one is an evaluation document."""
    root = tmp_path_factory.mktemp("pipeline")
    documents = [document.text[:1500] for document in read_documents([SAMPLE])][:12]
    train_tokenizer(documents, root / "tokenizer.model", vocab_size=640)
    for name, texts in (("train", documents), ("valid", documents[:1])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    embedder = tiny_bert.write_tiny_bert(root / "bert", max_position_embeddings=256)
    status, stdout, stderr = run_program(
        "tools/benchmark.py",
        "pipeline",
        f"--input={root}/train.jsonl",
        f"--evaluation={root}/valid.jsonl",
        f"--tokenizer={root}/tokenizer.model",
        f"--embedder={embedder}",
        f"--output={root}/made",
        "--length=128",
    )
    assert status == 0, stderr
    return root / "made", [json.loads(line) for line in stdout.splitlines()]


def test_the_pipeline_is_measured_stage_by_stage(measured):
    directory, (*stages, whole) = measured
    assert [line["stage"] for line in stages] == STAGES
    assert whole["stage"] == "all" and list(whole["shares"]) == STAGES
    assert sum(whole["shares"].values()) == pytest.approx(1, abs=0.001)
    assert whole["seconds"] == pytest.approx(sum(line["seconds"] for line in stages))
    assert whole["tokens"] == stages[1]["counts"]["tokens"]
    assert whole["tokens_per_second"] * whole["seconds"] == pytest.approx(whole["tokens"])
    assert stages[0]["counts"]["near_duplicates"] == 1 and stages[1]["counts"]["documents"] == 11
    assert all(line["cpu_seconds"] > 0.1 and line["peak_memory_bytes"] > 2**25 and line["bytes"] for line in stages)
    source = SequenceSource(directory / "sequences")
    assert len(source) == stages[-1]["counts"]["sequences"] and source.schema.length == 128


def test_what_cannot_be_measured_is_said(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(UserError, match="is not empty: what is there would not be done again"):
        next(pipeline.pipeline_lines(["a"], "b", "c", tmp_path))
    with pytest.raises(UserError, match=r"tools/build_corpus\.py ended with exit status 1"):
        next(pipeline.pipeline_lines([f"{tmp_path}/none"], "b", "c", tmp_path / "new"))
    assert "this benchmark needs --database" in error_line("tools/benchmark.py", "service")
