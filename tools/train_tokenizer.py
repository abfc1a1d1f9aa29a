"""Trains the SentencePiece tokenizer that every later stage uses.

    python tools/train_tokenizer.py --input='corpus/*.jsonl.gz' --output=tokenizer.model --vocab_size=32000

Reads .jsonl, .jsonl.gz, .jsonl.zst and .txt files. A sample of the lines is trained on when there are many. Documents
that build_corpus.py is to leave out (--exclusions) are left out here too.
"""

from collections.abc import Iterator
from pathlib import Path

from absl import flags

from retro_jax.data.sources import Source, exclusion_files
from retro_jax.data.text import ReadCounts, common_root, expand_inputs
from retro_jax.data.tokenizer import MODEL_TYPES, train_tokenizer
from retro_jax.files import file_sha256
from retro_jax.program import run

_INPUT = flags.DEFINE_list("input", None, "files or glob patterns, separated by commas", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "model file to write", required=True)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "number of tokens, the 256 bytes among them", lower_bound=1)
_MODEL_TYPE = flags.DEFINE_enum("model_type", "unigram", MODEL_TYPES, "algorithm; bpe trains faster and encodes slower")
_COVERAGE = flags.DEFINE_float(
    "character_coverage", 0.9995, "share of the characters with a token; the rest is spelt in bytes"
)
_MAX_SENTENCES = flags.DEFINE_integer("max_sentences", 1_000_000, "lines sampled to train on", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the sample")
_EXCLUSIONS = flags.DEFINE_string("exclusions", None, "output of tools/find_duplicates.py for these files, left out")
_SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "count and leave out lines that cannot be read")


def main() -> None:
    counts = ReadCounts()
    tokenizer = train_tokenizer(
        _texts(expand_inputs(_INPUT.value), counts),
        _OUTPUT.value,
        vocab_size=_VOCAB_SIZE.value,
        model_type=_MODEL_TYPE.value,
        character_coverage=_COVERAGE.value,
        max_sentences=_MAX_SENTENCES.value,
        seed=_SEED.value,
    )
    left_out = "".join(
        f", {count:,} {what} left out"
        for count, what in ((counts.bad_lines, "bad lines"), (counts.excluded_documents, "excluded documents"))
        if count
    )
    print(
        f"{_OUTPUT.value}: {tokenizer.vocab_size:,} tokens from {counts.documents - counts.excluded_documents:,} "
        f"documents{left_out}, fingerprint {tokenizer.fingerprint}"
    )


def _texts(paths: list[Path], counts: ReadCounts) -> Iterator[str]:
    excluded: list[str | None] = [None] * len(paths)
    if _EXCLUSIONS.value is not None:
        excluded = exclusion_files(_EXCLUSIONS.value, paths, [file_sha256(path)[:16] for path in paths])[1]
    for path, without in zip(paths, excluded, strict=True):
        source = Source(str(path), str(common_root(paths)), _SKIP_BAD.value, without)
        for _, document in source.documents(counts):
            yield document.text


if __name__ == "__main__":
    run(main)
