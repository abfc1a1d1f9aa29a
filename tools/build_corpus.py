"""Cuts documents into chunks of tokens: the corpus that is trained on, retrieved from, or evaluated.

    python tools/build_corpus.py --input='corpus/*.jsonl.gz' --tokenizer=tokenizer.model --output=DB/corpus

An input file is a unit of work. Run again after an interruption, it does those that are not finished.
"""

from absl import flags

from retro_jax.data.corpus import build_corpus
from retro_jax.data.text import expand_inputs
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.program import beam_options, define_beam_flags, run

_INPUT = flags.DEFINE_list("input", None, "files or glob patterns, separated by commas", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "model file of tools/train_tokenizer.py", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", required=True)
_CHUNK_LENGTH = flags.DEFINE_integer("chunk_length", 64, "tokens of a chunk", lower_bound=1)
_EXCLUSIONS = flags.DEFINE_string("exclusions", None, "output of tools/find_duplicates.py for these files, left out")
_SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "count and leave out unreadable lines and ids used before")
define_beam_flags()


def main() -> None:
    counts = build_corpus(
        expand_inputs(_INPUT.value),
        Tokenizer(_TOKENIZER.value),
        _OUTPUT.value,
        chunk_length=_CHUNK_LENGTH.value,
        skip_bad=_SKIP_BAD.value,
        exclusions=_EXCLUSIONS.value,
        options=beam_options(),
    ).counts
    left_out = "".join(
        f", {counts[key]:,} {what} left out"
        for key, what in (
            ("bad_lines", "bad lines"),
            ("excluded_documents", "excluded documents"),
            ("empty_documents", "empty documents"),
            ("duplicate_documents", "documents with an id used before"),
        )
        if counts[key]
    )
    print(
        f"{_OUTPUT.value}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens, "
        f"{counts['chunks']:,} chunks{left_out}"
    )


if __name__ == "__main__":
    run(main)
