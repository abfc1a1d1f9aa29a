"""Continues a prompt, retrieving at each chunk boundary, and shows the neighbours that were used; or scores a text.

python launch/sample.py --workdir=runs/retro --database=database --embedder=minilm --prompt="The capital of"
python launch/sample.py --workdir=runs/retro --service=127.0.0.1:50051 --prompt="The capital of"
python launch/sample.py --workdir=runs/retro --prompt="The capital of"          # RETRO[OFF], no retrieval
python launch/sample.py --workdir=runs/retro --database=database --embedder=minilm --prompt="Text to score" --score
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.data.stage import write_json
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.neighbours import ON_FAILURE, RetrievedChunk
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.inference.scoring import Scorer
from retro_jax.inference.text import TextStream
from retro_jax.training.trained import TrainedRun, load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Trained run.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue, or to score.")
_NEIGHBOURS = flags.DEFINE_string(
    "neighbours", None, 'JSON file of neighbours of your own, {"1": ["text", …], …}; chunks are counted from 1.'
)
_ON_FAILURE = flags.DEFINE_enum(
    "on_retrieval_failure", "error", ON_FAILURE, "What becomes of a chunk whose retrieval fails: off goes on without."
)
_K = flags.DEFINE_integer("k", None, "Neighbours for each chunk; as in training by default.", lower_bound=1)
_RETRIEVAL_STEP = flags.DEFINE_integer(
    "retrieval_step", None, "Cut chunks anew and retrieve every so many tokens; the chunk length by default."
)
_LEFT_PAD = flags.DEFINE_bool("left_pad", False, "Let the prompt end with a chunk, so that it has neighbours at once.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate at most.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations of the prompt.", lower_bound=1)
_STOP = flags.DEFINE_multi_string("stop", [], "A continuation ends before this text; may be given several times.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Temperature of the draw; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the most likely tokens up to this probability.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Keep tokens at least this times as likely as the most likely one.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 makes tokens that the text has less likely.")
_MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Tokens the model sees; the trained length by default.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to sample from; the newest by default.")
_SCORE = flags.DEFINE_bool("score", False, "Give the log-probability of each token of --prompt, and generate nothing.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for what is printed.")
program.define_retriever_flags(seconds=30)
flags.mark_flags_as_required(["workdir", "prompt"])


def main() -> None:
    decoding = Decoding(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value, _MIN_P.value, _PENALTY.value)
    try:
        _PROMPT.value.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8") from None
    run = load_trained(_WORKDIR.value, step=_STEP.value)
    given = _given(run)
    database = program.retriever(run)
    source = {
        "retriever": database,
        "neighbours": _K.value or run.config.data.neighbours,
        "max_context": _MAX_CONTEXT.value or max(run.config.data.length, 2 * run.config.model.chunk_length),
        "mesh": run.mesh,
        "on_retrieval_failure": _ON_FAILURE.value,
    }
    head = {
        "run": _WORKDIR.value,
        "step": run.step,
        "retrieval": database is not None or bool(given),
        "prompt": _PROMPT.value,
    }
    result = head | (
        _score(run, database, source, given) if _SCORE.value else _sample(run, database, source, given, decoding)
    )
    if not head["retrieval"]:
        print("\nno retrieval (OFF)", file=sys.stderr)
    if _OUTPUT.value:
        write_json(_OUTPUT.value, result)


def _sample(run: TrainedRun, database, source: dict[str, Any], given: dict, decoding: Decoding) -> dict[str, Any]:
    """Generates and prints; a single continuation as it comes, several one below the other."""
    sampler = Sampler(
        run.config.model,
        run.plan,
        run.params,
        vocab_size=run.tokenizer.vocab_size,
        retrieval_step=_RETRIEVAL_STEP.value,
        left_pad=_LEFT_PAD.value,
        **source,
    )
    count = _SAMPLES.value
    prompt = run.tokenizer.encode(_PROMPT.value)
    streams = [TextStream(run.tokenizer, _STOP.value) for _ in range(count)]
    texts, retrieved = [""] * count, [[] for _ in range(count)]

    def tell(index: int, piece: str) -> None:
        texts[index] += piece
        if count == 1:
            print(piece, end="", flush=True)

    if count == 1:
        print(_PROMPT.value, end="", flush=True)
    for index, sampled in sampler.generate_batch(
        [Request(prompt, sample=number, given=given) for number in range(count)],
        max_new_tokens=_TOKENS.value,
        decoding=decoding,
        stop=lambda index, _: streams[index].stopped,
    ):
        retrieved[index] += sampled.retrieved
        tell(index, streams[index].push(sampled.token))
    for index, stream in enumerate(streams):
        tell(index, stream.close())
    samples = []
    for number, (text, chunks) in enumerate(zip(texts, retrieved, strict=True), start=1):
        if count > 1:
            print(f"\nsample {number}\n{_PROMPT.value}{text}", end="")
        print()
        samples.append({"continuation": text, **_show(chunks, database, run)})
    return {**samples[0], "samples": samples}


def _score(run: TrainedRun, database, source: dict[str, Any], given: dict) -> dict[str, Any]:
    """Prints each token with its log-probability OFF and, when neighbours come from somewhere, ON."""
    tokens = run.tokenizer.encode(_PROMPT.value)
    scorer = Scorer(run.config.model, run.plan, run.params, **source)
    off = scorer.score(tokens, retrieve=False)
    scores, retrieved = {"off": off.log_probabilities.tolist()}, ()
    if database is not None or given:
        on = scorer.score(tokens, given=given)
        scores["on"], retrieved = on.log_probabilities.tolist(), on.retrieved
    pieces = [run.tokenizer.decode([token]) for token in tokens]
    print("\t".join([*(f"ln p {mode}" for mode in scores), "token"]))
    for place, piece in enumerate(pieces):
        print(
            "\t".join([*(f"{values[place]:.4f}" for values in scores.values()), json.dumps(piece, ensure_ascii=False)])
        )
    print("\t".join([*(f"{sum(values):.4f}" for values in scores.values()), "all"]))
    return {"tokens": pieces, "log_probabilities": scores, **_show(retrieved, database, run)}


def _given(run: TrainedRun) -> dict[int, list[list[int]]]:
    """Neighbours of --neighbours, as tokens by index of the chunk; what is too long for the model is cut off."""
    if not _NEIGHBOURS.value:
        return {}
    try:
        chunks = json.loads(Path(_NEIGHBOURS.value).read_text(encoding="utf-8"))
        texts = {int(number) - 1: [str(text) for text in texts] for number, texts in chunks.items()}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f'{_NEIGHBOURS.value}: expected JSON as {{"1": ["text of a neighbour", …], …}}') from None
    length = run.config.model.neighbour_length
    return {chunk: [run.tokenizer.encode(text)[:length] for text in neighbours] for chunk, neighbours in texts.items()}


def _show(chunks: list[RetrievedChunk], database, run: TrainedRun) -> dict[str, Any]:
    """Prints the neighbours of each chunk with their source, and why a chunk has none; gives both for the JSON file."""
    neighbours = [entry for chunk in chunks for entry in _describe(chunk, database, run)]
    for entry in neighbours:
        print(
            f"\nchunk {entry['chunk']}, neighbour {entry['rank']}, "
            + (
                f"distance {entry['distance']:.4f}, document {entry['document']} {entry['title']}"
                if entry["id"] >= 0
                else "given"
            )
            + f"\n  {json.dumps(entry['neighbour'], ensure_ascii=False)}"
            + f"\n  continues: {json.dumps(entry['continuation'], ensure_ascii=False)}"
        )
    failures = [{"chunk": chunk.chunk + 1, "reason": chunk.failure} for chunk in chunks if chunk.failure]
    for failure in failures:
        print(f"\nchunk {failure['chunk']} went on without neighbours (OFF): {failure['reason']}")
    return {"neighbours": neighbours, "failures": failures}


def _describe(chunk: RetrievedChunk, database, run: TrainedRun) -> list[dict[str, Any]]:
    length, pad = run.config.model.chunk_length, run.config.model.pad_id
    entries = []
    documents = [("", "")] * len(chunk.ids) if database is None else database.documents(chunk.ids)
    for rank, (chunk_id, distance, tokens, (document, title)) in enumerate(
        zip(chunk.ids, chunk.distances, chunk.tokens, documents, strict=True), start=1
    ):
        if (tokens == pad).all():
            continue
        entries.append(
            {
                "chunk": chunk.chunk + 1,
                "rank": rank,
                "id": int(chunk_id),
                "distance": float(distance) if chunk_id >= 0 else None,
                "document": document,
                "title": title,
                "neighbour": run.tokenizer.decode(tokens[:length]),
                "continuation": run.tokenizer.decode(tokens[length:]),
            }
        )
    return entries


if __name__ == "__main__":
    program.run(main)
