"""Finds training documents that are near-duplicates of validation or test documents, for build_corpus to leave out.

    python tools/find_duplicates.py --input='corpus/train-*.jsonl.gz' --evaluation='corpus/valid-*.jsonl.gz' \
        --titles=wikitext/valid.txt --output=duplicates
    python tools/build_corpus.py --input='corpus/train-*.jsonl.gz' --exclusions=duplicates ...

duplicates/removed-*.jsonl says what is removed and why. An input file is a unit of work; run again after an
interruption, it does those that are not finished.
"""

from absl import flags

from retro_jax.data.duplicates import MODES, TABLE_LIMIT, find_duplicates
from retro_jax.data.text import expand_inputs
from retro_jax.program import beam_options, define_beam_flags, run

_INPUT = flags.DEFINE_list("input", None, "training files or glob patterns, separated by commas", required=True)
_EVALUATION = flags.DEFINE_list("evaluation", [], "validation and test files or glob patterns")
_TITLES = flags.DEFINE_string("titles", None, "file of titles, one a line, or a WikiText file: articles to remove")
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", required=True)
_N = flags.DEFINE_integer("n", 13, "words of a shingle", lower_bound=1)
_THRESHOLD = flags.DEFINE_float("threshold", 0.8, "least Jaccard similarity that removes", 0, 1)
_MODE = flags.DEFINE_enum("mode", "auto", MODES, "exact table, MinHash-LSH, or by the size of the table")
_TABLE_LIMIT = flags.DEFINE_integer("table_limit", TABLE_LIMIT, "shingles of the exact table with --mode=auto")
_SKIP_BAD = flags.DEFINE_bool("skip_bad", False, "leave out unreadable lines")
define_beam_flags()


def main() -> None:
    counts = find_duplicates(
        expand_inputs(_INPUT.value),
        expand_inputs(_EVALUATION.value) if _EVALUATION.value else [],
        _OUTPUT.value,
        titles=_TITLES.value,
        n=_N.value,
        threshold=_THRESHOLD.value,
        mode=_MODE.value,
        table_limit=_TABLE_LIMIT.value,
        skip_bad=_SKIP_BAD.value,
        options=beam_options(),
    ).counts
    print(
        f"{_OUTPUT.value}: of {counts['documents']:,} documents ({counts['bytes']:,} bytes) "
        f"{counts['near_duplicates']:,} ({counts['near_duplicate_bytes']:,} bytes) are near-duplicates of evaluation "
        f"documents and {counts['titles']:,} ({counts['title_bytes']:,} bytes) have a listed title; mode "
        f"{counts['mode']}; listed in removed-*.jsonl"
    )


if __name__ == "__main__":
    run(main)
