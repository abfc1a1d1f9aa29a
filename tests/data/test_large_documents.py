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


def spaced(rng):
    known = [f"word{i}" for i in range(5000)]
    text = " ".join(rng.choice(known) for _ in range(SIZE // 9))
    return text + " end" * ((SIZE - len(text)) // 4)


def unspaced(rng):
    """Chinese characters of three bytes each, and nothing between them."""
    codes = np.random.default_rng(rng.randrange(2**32)).integers(0x4E00, 0x9FFF, SIZE // 3, dtype=np.uint16)
    return codes.astype("<u2").tobytes().decode("utf-16-le")


TEXTS = {"spaced": spaced, "unspaced": unspaced}


@pytest.mark.slow
@pytest.mark.parametrize("script", TEXTS)
def test_a_document_of_100_mb_in_one_line_is_compared_and_cut(tokenizer, tmp_path, script):
    text = TEXTS[script](random.Random(0))
    for name, content in (("train", text), ("valid", text[: len(text) // 2])):
        line = json.dumps({"id": name, "text": content}, ensure_ascii=False)
        (tmp_path / f"{name}.jsonl").write_text(line + "\n", encoding="utf-8")
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
    assert corpus.num_documents == 1 and corpus.num_bytes == len(text.encode())
    assert corpus.byte_counts(np.arange(corpus.num_chunks)).sum() == corpus.num_bytes
