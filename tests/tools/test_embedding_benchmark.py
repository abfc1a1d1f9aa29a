"""The benchmark of embedding: every side embeds the same texts, and says how near it comes to float32."""

import json
import sys

import numpy as np
import pytest
import tiny_bert
from small_run import ROOT, error_line, run_program

from retro_jax.retrieval.bert import BertConfig, load_bert
from retro_jax.retrieval.wordpiece import WordPiece

sys.path.insert(0, str(ROOT / "tools"))
from benchmarks import children, embedding, random_bert


def test_our_side_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "OURS", {"retro_jax_float32": {"compute_dtype": "float32"}})
    checkpoint = tiny_bert.write_tiny_bert(tmp_path / "bert", max_position_embeddings=256)
    texts = random_bert.synthetic_texts(checkpoint, 6)
    ours, comparison = embedding.embedding_lines(checkpoint, texts, peers=(), cores=1, turns=1, seconds=0.01)
    assert (ours["engine"], ours["chunks"], ours["word_pieces_mean"], ours["cores"]) == ("retro_jax_float32", 6, 64, 1)
    assert (ours["layers"], ours["width"]) == (3, 24)
    # 3 layers of 62 + 2 tokens: 4 products of 24 x 24, two of 24 x 40, and two of 64 x 24 in attention.
    gflop = 3 * 64 * 2 * (4 * 24 * 24 + 2 * 24 * 40 + 2 * 64 * 24) / 1e9
    assert ours["gflops_per_second"] == pytest.approx(gflop * ours["chunks_per_second"])
    assert ours["cosine_to_float32"] is None
    assert comparison["chunks_per_second"] == {"retro_jax_float32": ours["chunks_per_second"]}


def test_sides_take_turns_and_are_compared_with_float32(monkeypatch, tmp_path):
    checkpoint = tiny_bert.write_tiny_bert(tmp_path / "bert")
    order = []

    def run(python: str, module: str, job: dict) -> dict:
        order.append(job["side"])
        if job["side"] == "export":
            return {}
        x = 0.6 if "bfloat16" in job["side"] else 1.0
        np.save(f"{job['folder']}/{job['side']}.npy", np.array([[x, np.sqrt(1 - x * x)], [0, 0], [1, 0]], np.float32))
        rate = {"retro_jax_float32": 8.0, "retro_jax_bfloat16": 16.0, "onnxruntime_float32": 4.0}.get(job["side"], 2.0)
        measured = {"load_seconds": 1.0, "peak_memory_bytes": 5, "cores": 2, "version": "1"}
        return {"chunks_per_second": rate + len(order) / 1000, "word_pieces": [4, 0, 6], **measured}

    monkeypatch.setattr(children, "run", run)
    monkeypatch.setattr(embedding, "environment", lambda python: "peer-python")
    *lines, comparison = embedding.embedding_lines(checkpoint, ["a", "", "b"], turns=2)
    assert order == ["export", *[*embedding.OURS, *embedding.PEERS] * 2]
    by_name = {line["engine"]: line for line in lines}
    assert by_name["torch_bfloat16"]["cosine_to_float32"] == pytest.approx(0.8)
    assert by_name["torch_bfloat16"]["least_cosine_to_float32"] == pytest.approx(0.6)
    assert by_name["retro_jax_float32"]["cosine_to_float32"] == pytest.approx(1)
    assert by_name["retro_jax_float32"]["chunks_per_second"] == 8.007  # the better turn
    # The quicker of ours is not faithful enough to be compared.
    assert comparison["ours"] == "retro_jax_float32"
    assert comparison["ratio_to_onnxruntime_float32"] == pytest.approx(8.007 / 4.009)


def test_a_random_checkpoint_has_the_shape_and_reads_the_texts(tmp_path, monkeypatch):
    tiny = tiny_bert.write_tiny_bert(tmp_path / "tiny")
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    monkeypatch.setitem(random_bert.SHAPES, "small", shape)
    made = random_bert.random_checkpoint("small", tiny, tmp_path / "made")
    config = BertConfig.load(made)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (8, 2, len(tiny_bert.VOCABULARY))
    assert load_bert(made).config == config
    texts = random_bert.synthetic_texts(made, 3)
    assert [len(pieces) for pieces in WordPiece(made)(texts)] == [62] * 3 and len(set(texts)) == 3


def test_mistakes_are_named():
    assert "this benchmark needs --embedder" in error_line("tools/benchmark.py", "embedding")
    assert "'tensorflow' is none of onnxruntime_float32, torch_float32" in error_line(
        "tools/benchmark.py", "embedding", "--embedder=tests", "--corpus=", "--embedding_peers=tensorflow"
    )


@pytest.mark.slow
def test_every_peer_gives_our_vectors(embedder_directory):
    """Makes the peers' environment, so it needs a package index."""
    flags = ("embedding", f"--embedder={embedder_directory}", "--chunks=8", "--rounds=1")
    status, stdout, stderr = run_program("tools/benchmark.py", *flags)
    assert status == 0, stderr
    *lines, comparison = map(json.loads, stdout.splitlines())
    assert all(line["synthetic_texts"] and line["word_pieces_mean"] == 64 for line in lines)
    nearness = {line["engine"]: line["least_cosine_to_float32"] for line in lines}
    assert set(nearness) == {*embedding.OURS, *embedding.PEERS}
    assert min(nearness["retro_jax_float32"], nearness["onnxruntime_float32"]) > 0.9999
    assert nearness["retro_jax_bfloat16"] > 0.99
    assert 0.99 < nearness["torch_bfloat16"] < 1 == pytest.approx(nearness["torch_float32"])
    assert comparison["ratio_to_onnxruntime_float32"] > 0
