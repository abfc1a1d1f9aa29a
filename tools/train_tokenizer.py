"""Trains the SentencePiece tokenizer that every later stage uses.

    python tools/train_tokenizer.py --input='corpus/*.jsonl.gz' --output=tokenizer.model --vocab_size=32000

Reads .jsonl, .jsonl.gz, .jsonl.zst and .txt files. A sample of the lines is trained on when there are many.
"""

from absl import flags

from retro_jax.data.text import ReadCounts, expand_inputs, read_documents
from retro_jax.data.tokenizer import MODEL_TYPES, train_tokenizer
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
_SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "count and leave out lines that cannot be read")


def main() -> None:
    counts = ReadCounts()
    documents = read_documents(expand_inputs(_INPUT.value), skip_bad=_SKIP_BAD.value, counts=counts)
    tokenizer = train_tokenizer(
        (document.text for document in documents),
        _OUTPUT.value,
        vocab_size=_VOCAB_SIZE.value,
        model_type=_MODEL_TYPE.value,
        character_coverage=_COVERAGE.value,
        max_sentences=_MAX_SENTENCES.value,
        seed=_SEED.value,
    )
    skipped = f", {counts.bad_lines:,} bad lines left out" if counts.bad_lines else ""
    print(
        f"{_OUTPUT.value}: {tokenizer.vocab_size:,} tokens from {counts.documents:,} documents{skipped}, "
        f"fingerprint {tokenizer.fingerprint}"
    )


if __name__ == "__main__":
    run(main)
