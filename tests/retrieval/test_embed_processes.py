"""Several processes share the shards of a corpus and write what one process writes."""

import os
import signal
import subprocess
import sys

import numpy as np
import tiny_bert
from processes import finish, free_port
from small_run import ROOT

from retro_jax.retrieval.embedder import Embedder, EmbeddingSet, embed_corpus

KILLED = """
import os, signal, sys
from retro_jax.data.corpus import Corpus
from retro_jax.retrieval import embedder

real = embedder._embed_shard

def second(corpus, model, path, start, stop, progress):
    counts = real(corpus, model, path, start, stop, progress)
    if start:  # its vectors are written, and it is not committed
        os.kill(os.getpid(), signal.SIGKILL)
    return counts

embedder._embed_shard = second
model = embedder.Embedder.load(sys.argv[2], normalize=False, max_length=96)
embedder.embed_corpus(Corpus(sys.argv[1]), model, sys.argv[3])
"""

RECORDS = [
    [{"id": f"{i}-{j}", "text": f"document {j} of file {i}, some words" * (j + 1)} for j in range(4)] for i in range(3)
]


def embed(corpus, embedder, output, *flags):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "embed_chunks.py"), f"--corpus={corpus.directory}",
         f"--embedder={embedder}", f"--output={output}", "--max_length=96", *flags],
        cwd=ROOT, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_write_what_one_writes(make_corpus, tmp_path):
    corpus = make_corpus(RECORDS)
    embedder = tiny_bert.write_tiny_bert(tmp_path / "bert")
    place = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    runs = [embed(corpus, embedder, tmp_path / "two", *place, f"--process_id={i}") for i in range(2)]
    embed_corpus(corpus, Embedder.load(embedder, normalize=False, max_length=96), tmp_path / "one")
    first, second = finish(runs, timeout=120)
    assert first[0] == second[0] == 0, (first, second)
    assert "chunks as vectors of 24" in first[1] and not second[1]
    one, two = EmbeddingSet(tmp_path / "one", verify=True), EmbeddingSet(tmp_path / "two", verify=True)
    assert one.manifest.counts == two.manifest.counts
    np.testing.assert_allclose(one[:], two[:], atol=1e-6)
    assert len(list((tmp_path / "two").glob("*.npy"))) == 3


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(make_corpus, tmp_path):
    corpus = make_corpus(RECORDS)
    checkpoint = tiny_bert.write_tiny_bert(tmp_path / "bert")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, corpus.directory, checkpoint, tmp_path / "killed"], cwd=ROOT, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    (kept,) = (tmp_path / "killed").glob("embeddings-*.npy")
    before = kept.stat().st_mtime_ns
    embedder = Embedder.load(checkpoint, normalize=False, max_length=96)
    manifests = [embed_corpus(corpus, embedder, tmp_path / name) for name in ("killed", "once")]
    assert kept.stat().st_mtime_ns == before and manifests[0] == manifests[1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()
    }
