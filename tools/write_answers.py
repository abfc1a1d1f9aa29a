"""Writes questions, their passages and answers as training sequences, for launch/train.py.

    python tools/write_answers.py --examples=questions/train.jsonl --tokenizer=RUN/tokenizer.model --output=answers
    python tools/write_answers.py ... --prompt_chunks=3 --passages=19 --passages_in_prompt=1     # RETRO++
    python tools/write_answers.py ... --prompt_chunks=7 --passages=0 --passages_in_prompt=20     # a decoder reads them

The decoder reads "question: … \\n answer:", padded on the left so that it ends with a chunk, and then the answer; the
passages are neighbours of that chunk (paper section 4.3 and appendix C.4). Training puts loss on answer and end token
alone, unless --config.data.score_prompt says otherwise. Questions are JSON lines or a JSON list in Fusion-in-Decoder's
format, as tools/retrieve_passages.py writes them. Run again after an interruption, it writes what is not finished.
"""

from absl import flags

from retro_jax.data.answer_rows import RowLayout, write_answers
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.program import run

_EXAMPLES = flags.DEFINE_string("examples", None, "questions with passages", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenizer of the model that is fine-tuned", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "directory to write", required=True)
_PROMPT_CHUNKS = flags.DEFINE_integer("prompt_chunks", 1, "chunks of the prompt", lower_bound=1)
_PASSAGES = flags.DEFINE_integer("passages", 20, "passages that the encoder reads", lower_bound=0)
_IN_PROMPT = flags.DEFINE_integer("passages_in_prompt", 0, "the best so many stand in the prompt", lower_bound=0)
_CHUNK_LENGTH = flags.DEFINE_integer("chunk_length", 64, "tokens of a chunk of the model", lower_bound=2)
_NEIGHBOUR_LENGTH = flags.DEFINE_integer("neighbour_length", 128, "tokens of a neighbour of the model", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the answers drawn for questions without a target", lower_bound=0)
_SHARD_RECORDS = flags.DEFINE_integer("shard_records", 8192, "questions of a file", lower_bound=1)


def main() -> None:
    layout = RowLayout(
        _PROMPT_CHUNKS.value, _PASSAGES.value, _IN_PROMPT.value, _CHUNK_LENGTH.value, _NEIGHBOUR_LENGTH.value
    )
    tokenizer = Tokenizer(_TOKENIZER.value)
    manifest = write_answers(
        _EXAMPLES.value,
        tokenizer,
        _OUTPUT.value,
        layout,
        seed=_SEED.value,
        shard_records=_SHARD_RECORDS.value,
    )
    counts, histogram = manifest.counts, manifest.counts["questions_by_passages"]
    length = layout.schema(tokenizer.vocab_size).length
    print(
        f"{_OUTPUT.value}: {counts['sequences']:,} questions in sequences of {length} tokens; "
        f"{counts['cut_prompts']:,} too long for the prompt, {counts['cut_answers']:,} answers cut, "
        f"{sum(histogram[:-1]):,} with fewer than {layout.passages} passages"
    )
    if layout.passages_in_prompt:
        print(f"{counts['passages_in_prompts'] / counts['sequences']:.2f} passages in a prompt on average")


if __name__ == "__main__":
    run(main)
