"""Processes killed at random places: run again, the stages redo only what is unfinished and end with the same bytes."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from build_all import build_all
from sample_data import SAMPLE, write_jsonl

from retro_jax.data.text import read_documents

LAST_OF_A_UNIT = (
    "chunks-",
    "digests-",
    "evaluation-names-",
    "removed-",
    "embeddings-",
    "shard.json",
    "neighbours-",
    "sequences-",
)
PROGRAM = Path(__file__).with_name("build_all.py")


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory):
    """(directory with inputs, bytes of the outputs of an undisturbed run by name)."""
    root = tmp_path_factory.mktemp("prepared")
    shutil.copyfile(tokenizer.path, root / "tokenizer.model")
    documents = list(read_documents([SAMPLE]))
    for i in range(5):
        records = [{"id": f"{i}-{d.id}", "text": d.text, "group": d.group} for d in documents[i::5] + documents[i::7]]
        for number, record in enumerate(records):
            record["id"] += f"-{number}"
        write_jsonl(root / f"train-{i}.jsonl", records)
    write_jsonl(root / "valid-0.jsonl", [{"id": d.id, "text": d.text + " and more"} for d in documents[::11]])
    build_all(root, root / "whole", 1)
    return root, contents(root / "whole")


def contents(directory):
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def finished(directory):
    """Last shards of finished units, and finished stages: what need not be written again, with the time it was."""
    sides = [path.with_name(path.name.removesuffix(".done.json")) for path in directory.rglob("*.done.json")]
    shards = [path for path in sides if path.name.startswith(LAST_OF_A_UNIT) and path.exists()]
    for manifest in directory.rglob("manifest.json"):
        shards += [path for path in manifest.parent.iterdir() if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in shards}


def start(root, output, workers):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(root), str(output), str(workers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def count(directory):
    """Files and folders, while others come and go."""
    return sum(len(folders) + len(names) for _, folders, names in os.walk(directory))


def kill_within(process, output, rng, seconds):
    """Kills one of the program's processes at a random time after it has begun to write."""
    before = count(output)
    while process.poll() is None and count(output) <= before:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, seconds))
    if process.poll() is not None:
        return
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    try:
        os.kill(rng.choice(tree).pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


@pytest.mark.parametrize(
    ("workers", "kills", "seconds"),
    [(1, 3, 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 20, 1.0), (2, 20, 9.0)))],
)
def test_killed_builds_end_with_the_same_bytes(prepared, tmp_path, workers, kills, seconds):
    root, whole = prepared
    rng = random.Random(workers)
    round_, done, killed = 0, 0, 0
    while killed < kills:
        output = tmp_path / f"out-{round_}"
        kept = finished(output)
        process = start(root, output, workers)
        kill_within(process, output, rng, seconds)
        _, stderr = process.communicate(timeout=60)
        for path, written in kept.items():
            if path.exists():  # what only helped to make a stage goes when the stage is complete
                assert path.stat().st_mtime_ns == written, path
        if process.returncode == 0:
            assert contents(output) == whole
            round_, done = round_ + 1, done + 1
        else:
            killed += 1
            print("killed in", sorted(path.name for path in output.iterdir())[-1] if output.exists() else "nothing")
            assert process.returncode == -signal.SIGKILL or "worker process was killed" in stderr, stderr
    process = start(root, output, workers)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert contents(output) == whole
