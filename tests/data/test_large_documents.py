"""Memory: a document of 100 MB in one line is bounded by its own size, and a corpus by nothing but its files."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retro_jax.data.corpus import Corpus

SIZE = 100_000_000
MEMORY = 2_000_000_000
HERE = Path(__file__).parent


def peak_memory(code):
    """Largest resident size in bytes of a process that runs this code."""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.slow
def test_a_document_of_100_mb_in_one_line_is_compared_and_cut(tokenizer, tmp_path):
    rng = random.Random(0)
    known = [f"word{i}" for i in range(5000)]
    text = " ".join(rng.choice(known) for _ in range(SIZE // 9))
    text += " end" * ((SIZE - len(text)) // 4)
    for name, content in (("train", text), ("valid", text[: SIZE // 2])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": content}) + "\n")
    memory = peak_memory(
        "from retro_jax.data.duplicates import find_duplicates\n"
        f"find_duplicates([{str(tmp_path / 'train.jsonl')!r}], [{str(tmp_path / 'valid.jsonl')!r}],"
        f"{str(tmp_path / 'duplicates')!r})"
    )
    print(f"find_duplicates: {memory / 1e6:.0f} MB")
    assert memory < MEMORY
    memory = peak_memory(
        "from retro_jax.data.corpus import build_corpus\nfrom retro_jax.data.tokenizer import Tokenizer\n"
        f"build_corpus([{str(tmp_path / 'train.jsonl')!r}], Tokenizer({str(tokenizer.path)!r}),"
        f"{str(tmp_path / 'corpus')!r}, exclusions={str(tmp_path / 'duplicates')!r})"
    )
    print(f"build_corpus: {memory / 1e6:.0f} MB")
    assert memory < MEMORY
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.num_documents == 1 and corpus.num_bytes == len(text)
    assert corpus.byte_counts(np.arange(corpus.num_chunks)).sum() == len(text)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    """Four files of 1.5 MB and twenty-four of them, from near-duplicates to sequences."""
    rng = random.Random(0)
    known = [f"word{i}" for i in range(5000)]
    for number in range(24):
        with open(tmp_path / f"train-{number:02d}.jsonl", "w") as file:
            for row in range(300):
                text = " ".join(rng.choice(known) for _ in range(550))
                file.write(json.dumps({"id": f"{number}-{row}", "text": text}) + "\n")
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    shutil.copyfile(tmp_path / "train-00.jsonl", tmp_path / "valid-00.jsonl")
    peaks = []
    for pattern, output in (("train-0[0-3]", "few"), ("train-*", "many")):
        root = tmp_path / f"root-{output}"
        root.mkdir()
        for path in [*tmp_path.glob(f"{pattern}.jsonl"), tmp_path / "valid-00.jsonl", tmp_path / "tokenizer.model"]:
            (root / path.name).symlink_to(path)
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path; from build_all import build_all;"
        )
        peaks.append(peak_memory(f"{code} build_all(Path({str(root)!r}), Path({str(tmp_path / output)!r}), 1)"))
    print("peaks:", [f"{peak / 1e6:.0f} MB" for peak in peaks])
    assert Corpus(tmp_path / "many" / "corpus").num_bytes > 5 * Corpus(tmp_path / "few" / "corpus").num_bytes > 2e7
    # Six times the text; the index holds a quarter of all vectors at a time, and is small here.
    assert peaks[1] < peaks[0] + 60_000_000
