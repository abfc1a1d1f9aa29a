"""The benchmark of generation measures both sides alike and compares what is the same."""

import dataclasses
import shutil
import sys

import pytest
import small_run
from small_run import ROOT
from tiny_bert import write_tiny_bert

from retro_jax.config import MeshConfig, RetroConfig
from retro_jax.data.corpus import Corpus
from retro_jax.errors import UserError
from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus
from retro_jax.retrieval.index_build import build_index

sys.path.insert(0, str(ROOT / "tools"))
from benchmarks import children, sample, sample_step

MODEL = RetroConfig.preset("demo")


def test_our_side_tells_first_token_speed_and_time_by_position(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    plan = sample.Plan(lengths=(66, 130), batch_sizes=(2,), prompt=64)
    short, long = sample.alone(MODEL, plan, MeshConfig())
    assert (short["benchmark"], short["batch_size"], short["new_tokens"]) == ("sample", 2, 66)
    assert short["tokens_per_second"] * short["seconds"] == pytest.approx(2 * 66)
    assert 0 < short["first_token_seconds"] < short["seconds"] < short["first_run_seconds"]
    assert 0 < short["retrieval_seconds"] < short["seconds"]
    assert list(long["token_seconds_by_position"]) == ["128"]
    assert long["slowest_to_fastest_position"] == {512: 1.0, 2048: 1.0} and not short["slowest_to_fastest_position"]
    assert (long["neighbours"], long["retrievals"]) == ("random", 3)  # at the prompt's end, and of two chunks after it


@pytest.mark.slow
def test_the_time_of_a_live_database_is_told_apart(small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    database, bert = tmp_path / "database", write_tiny_bert(tmp_path / "bert")
    shutil.copytree(small_data.database / "corpus", database / "corpus")
    embedder = Embedder.load(bert, normalize=False, max_length=32)
    embed_corpus(Corpus(database / "corpus"), embedder, database / "embeddings")
    build_index(EmbeddingSet(database / "embeddings"), database / "index")
    plan = sample.Plan(lengths=(12,), batch_sizes=(1,), prompt=8, database=str(database), embedder=str(bert))
    (line,) = sample.alone(small_run.MODEL, plan, MeshConfig())
    assert (line["neighbours"], line["retrievals"]) == (str(database), 2)
    assert 0 < line["retrieval_seconds"] < line["seconds"]
    with pytest.raises(UserError, match="has 640 tokens, the model 600: give --vocab_size"):
        sample.alone(dataclasses.replace(small_run.MODEL, vocab_size=600), plan, MeshConfig())


def test_time_by_position_is_that_of_whole_chunks():
    # The first token by itself, then those up to the end of its chunk, then a chunk at once.
    arrivals = [1.0] + [2.0] * 3 + [6.0] * 4 + [14.0] * 4
    assert sample_step._by_position(arrivals, prompt=8, chunk_length=4) == {12: 1.0, 16: 2.0}
    assert sample.flatness({"12": 1.0, "16": 2.0}, 16) == 2.0 and sample.flatness({"12": 1.0, "16": 2.0}, 15) == 1.0


def test_sides_take_turns_and_the_ratio_is_of_the_best_rounds(monkeypatch):
    calls = []

    def run(python, module, job, environment=None):
        peer = module == sample.PEER_MODULE
        calls.append("peer" if peer else "ours")
        assert (job["lengths"], job["batch_sizes"], job["prompt"], job["k"]) == ((64, 128), (1,), 64, 2)
        assert not peer or (job["length"] == 64 + 128 and job["width"] == MODEL.width and python == "peer-python")
        speed = (10.0 if peer else 300.0) * (1 + calls.count(calls[-1]))
        return {
            "cases": [
                {
                    "batch_size": 1,
                    "new_tokens": length,
                    "tokens_per_second": speed,
                    "first_token_seconds": 0.5,
                    "token_seconds_by_position": {"128": 1 / speed},
                }
                for length in (64, 128)
            ]
        }

    monkeypatch.setattr(children, "run", run)
    plan = sample.Plan(lengths=(64, 128), batch_sizes=(1,), rounds=2)
    lines = sample.against_peer(MODEL, plan, "peer-python")
    assert calls == ["ours", "peer", "ours", "peer"]
    assert [line["benchmark"] for line in lines] == ["sample"] * 2 + ["peer"] * 2 + ["comparison"] * 2
    assert [line["speed_ratio_to_peer"] for line in lines[4:]] == [30.0, 30.0]
    assert lines[0]["token_seconds_by_position"] == {"128": 1 / 900}
