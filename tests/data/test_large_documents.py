"""A document of 100 MB in one line goes through, in memory that its own size bounds."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from retro_jax.data.corpus import Corpus

SIZE = 100_000_000
MEMORY = 2_000_000_000


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
