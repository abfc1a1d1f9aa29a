"""The data programs as a user runs them: what they write, and one line for every mistake."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_jax.data.arrays import ArrayWriter
from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.stage import Stage
from retro_jax.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "experiments" / "sample" / "sample.jsonl"


def run(tool, **flags):
    command = [
        sys.executable,
        str(ROOT / "tools" / f"{tool}.py"),
        *(f"--{name}={value}" for name, value in flags.items()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def assert_one_line(result, *words):
    """The program stopped with one clear line that has all these words in it; lines of progress may stand before it."""
    assert result.returncode == 1, result.stderr
    lines = [
        line
        for line in result.stderr.splitlines()
        if not re.match(r"(checksums|reading|corpus|sequences): [\d,]+/", line)
    ]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with what the tools make of the sample."""
    root = tmp_path_factory.mktemp("tools")
    result = run("train_tokenizer", input=SAMPLE, output=root / "tokenizer.model", vocab_size=1000)
    assert result.returncode == 0, result.stderr
    assert "1,000 tokens from 53 documents" in result.stdout
    result = run("build_corpus", input=SAMPLE, tokenizer=root / "tokenizer.model", output=root / "DB" / "corpus")
    assert result.returncode == 0, result.stderr
    assert "53 documents, 271,236 bytes" in result.stdout
    write_neighbours(root, Corpus(root / "DB" / "corpus"))
    return root


def write_neighbours(root, corpus, k=4):
    """A neighbours directory with random neighbours, so that no index is needed here."""
    dtype = np.dtype([("ids", "<i8", (k,)), ("distances", "<f4", (k,))])
    rows = np.zeros(corpus.num_chunks, dtype)
    rows["ids"] = np.random.default_rng(0).integers(0, corpus.num_chunks, (corpus.num_chunks, k))
    inputs = {
        "corpus": corpus.fingerprint,
        "embeddings": "e",
        "database": "d",
        "database_corpus": corpus.fingerprint,
    }
    settings = {"k": k, "filter": "none"}
    with Stage(root / "neighbours", "neighbours", settings=settings, inputs=inputs) as stage:
        with stage.shard("neighbours-00000-of-00001.npy") as (path, _), ArrayWriter(path, dtype) as writer:
            writer.append(rows)
        stage.finish({"chunks": len(rows)})


def write_sequences(made, output, **changes):
    flags = {
        "corpus": made / "DB" / "corpus",
        "neighbours": made / "neighbours",
        "database": made / "DB",
        "output": output,
        "length": 512,
        "k": 2,
    }
    return run("write_sequences", **{**flags, **changes})


def test_tools_make_what_the_library_reads(made, tmp_path):
    tokenizer = Tokenizer(made / "tokenizer.model")
    corpus = Corpus(made / "DB" / "corpus", verify=True)
    assert corpus.tokenizer_fingerprint == tokenizer.fingerprint
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text().splitlines()]
    assert tokenizer.decode(corpus.tokens(np.arange(corpus.num_chunks))) == "".join(texts)
    result = write_sequences(made, tmp_path / "sequences", packing="packed")
    assert result.returncode == 0, result.stderr
    source = SequenceSource(tmp_path / "sequences")
    assert f"{len(source)} sequences of 512 tokens" in result.stdout
    assert dataclasses.astuple(source.schema) == (512, 64, 2, 128, 1000)
    again = write_sequences(made, tmp_path / "sequences", packing="packed")
    assert again.stdout == result.stdout
    assert_one_line(write_sequences(made, tmp_path / "sequences"), "settings.packing = packed, now it is document")


def test_skip_bad_counts_and_goes_on(made, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        SAMPLE.read_bytes() + b'{"text": "\xff"}\nnot json\n' + SAMPLE.read_bytes().splitlines()[0] + b"\n"
    )
    flags = {"input": path, "tokenizer": made / "tokenizer.model", "output": tmp_path / "corpus"}
    assert_one_line(run("build_corpus", **flags), "bad.jsonl:54: not UTF-8")
    assert not (tmp_path / "corpus").exists()
    result = run("build_corpus", **flags, skip_bad=True)
    assert result.returncode == 0, result.stderr
    assert "53 documents" in result.stdout
    assert "2 bad lines left out" in result.stdout
    assert "1 documents with an id used before left out" in result.stdout
    flags = {"input": path, "output": tmp_path / "t.model", "vocab_size": 1000}
    assert_one_line(run("train_tokenizer", **flags), "bad.jsonl:54: not UTF-8")
    result = run("train_tokenizer", **flags, skip_bad=True)
    assert "2 bad lines left out" in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"input": "nowhere.jsonl"}, ("nowhere.jsonl: no such file",)),
        ({"input": "setup.py"}, ("setup.py: unknown kind of file",)),
        ({"vocab_size": 1_000_000}, ("at most", "is possible")),
        ({"vocab_size": "many"}, ("vocab_size", "many")),
        ({"vocab_sise": 500}, ("Unknown command line flag 'vocab_sise'", "vocab_size")),
        ({"output": None}, ("--output",)),
    ],
    ids=["missing", "kind", "vocabulary", "no number", "unknown flag", "missing flag"],
)
def test_train_tokenizer_mistakes(tmp_path, flags, words):
    given = {"input": SAMPLE, "output": tmp_path / "t.model", "vocab_size": 1000, **flags}
    given = {name: value for name, value in given.items() if value is not None}
    assert_one_line(run("train_tokenizer", **given), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tokenizer": "nowhere.model"}, ("nowhere.model: no such tokenizer file",)),
        ({"tokenizer": SAMPLE}, ("sample.jsonl: not a tokenizer of the tokenizers library",)),
        ({"tokenizer": Path(__file__)}, (f"{Path(__file__).name}: not a SentencePiece model",)),
        ({"input": "empty"}, ("no document with text",)),
        ({"input": "short"}, ("no document fills a chunk of 64 tokens",)),
        ({"output": SAMPLE}, ("is a file; the corpus stage needs a directory",)),
        ({"output": "tools"}, ("is not empty and holds no corpus stage",)),
        ({"output": "/proc/no/such"}, ("/proc/no",)),
    ],
    ids=[
        "no tokenizer",
        "bad tokenizer",
        "no tokenizer at all",
        "empty",
        "short",
        "file",
        "other directory",
        "unwritable",
    ],
)
def test_build_corpus_mistakes(made, tmp_path, flags, words):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n')
    if flags.get("input") in ("empty", "short"):
        flags = {"input": tmp_path / f"{flags['input']}.jsonl"}
    given = {"input": SAMPLE, "tokenizer": made / "tokenizer.model", "output": tmp_path / "corpus", **flags}
    assert_one_line(run("build_corpus", **given), *words)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"corpus": "nowhere"}, ("nowhere: no such directory", "corpus")),
        ({"corpus": "neighbours"}, ("holds the neighbours stage; expected corpus",)),
        ({"length": 100}, ("length 100 is no multiple of chunk_length 64",)),
        ({"k": 9}, ("k is 9; the neighbours hold from 1 to 4",)),
        ({"corpus": "other"}, ("those of another corpus",)),
        ({"neighbours": "cut"}, ("neighbours-00000-of-00001.npy", "the manifest says")),
    ],
    ids=["missing", "other stage", "length", "k", "other corpus", "truncated"],
)
def test_write_sequences_mistakes(made, tmp_path, flags, words):
    flags = dict(flags)
    if flags.get("corpus") == "neighbours":
        flags["corpus"] = made / "neighbours"
    if flags.get("corpus") == "other":
        path = tmp_path / "other.jsonl"
        path.write_bytes(b"".join(SAMPLE.read_bytes().splitlines(keepends=True)[:5]))
        result = run("build_corpus", input=path, tokenizer=made / "tokenizer.model", output=tmp_path / "other")
        assert result.returncode == 0, result.stderr
        flags["corpus"] = tmp_path / "other"
    if "neighbours" in flags:
        flags["neighbours"] = tmp_path / "cut"
        (tmp_path / "cut").mkdir()
        for file in (made / "neighbours").iterdir():
            (tmp_path / "cut" / file.name).write_bytes(file.read_bytes()[: -1 if file.suffix == ".npy" else None])
    assert_one_line(write_sequences(made, tmp_path / "sequences", **flags), *words)
    assert not (tmp_path / "sequences").exists()


def test_full_disk_is_one_line_and_finished_parts_stay(made, tmp_path):
    """A file size limit stands for the full disk: the write fails, what was finished is used again."""
    first = tmp_path / "a.jsonl"
    lines = SAMPLE.read_bytes().splitlines(keepends=True)
    first.write_bytes(lines[0])
    second = tmp_path / "b.jsonl"
    second.write_bytes(b"".join(lines[1:]))
    flags = {"input": f"{first},{second}", "tokenizer": made / "tokenizer.model", "output": tmp_path / "corpus"}
    command = [sys.executable, str(ROOT / "tools" / "build_corpus.py"), *(f"--{n}={v}" for n, v in flags.items())]
    limited = (
        "import errno, runpy, sys; import retro_jax.data.arrays as arrays\n"
        "append = arrays.ArrayWriter.append\n"
        "def full(self, rows):\n"
        "    if self._file.tell() > 40_000:\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device', self._file.name)\n"
        "    append(self, rows)\n"
        "arrays.ArrayWriter.append = full\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, *command[1:]], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert_one_line(result, "no space left on the device", "finished parts are kept")
    names = sorted(path.name for path in (tmp_path / "corpus").iterdir())
    assert "chunks-00000-of-00002.npy" in names and "chunks-00001-of-00002.npy" not in names
    assert not any(name.startswith(".tmp") for name in names)
    result = run("build_corpus", **flags)
    assert result.returncode == 0, result.stderr
    assert Corpus(tmp_path / "corpus", verify=True).num_documents == 53
