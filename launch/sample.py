"""Continues prompts, retrieving at each chunk boundary, and shows the neighbours that were used; or scores a text.

python launch/sample.py --workdir=runs/retro --database=database --embedder=minilm --prompt="The capital of"
python launch/sample.py --workdir=runs/retro --service=127.0.0.1:50051 --prompt="The capital of"
python launch/sample.py --workdir=runs/retro --prompt="The capital of"          # RETRO[OFF], no retrieval
python launch/sample.py --workdir=runs/retro --database=database --embedder=minilm --prompt="Text to score" --score
python launch/sample.py --workdir=runs/retro --database=database --embedder=minilm --prompts=questions.jsonl
python launch/sample.py --workdir=runs/retro --service=127.0.0.1:50051 --interactive    # a prompt a line

Before every prompt, or batch of --prompts, it looks whether the database has changed, and goes by what it is then.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.files import write_json
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.neighbours import ON_FAILURE, RetrievedChunk
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.inference.scoring import Scorer
from retro_jax.inference.text import TextStream, begins_with
from retro_jax.training.trained import TrainedRun, load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Trained run.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue, or to score.")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "File of many: JSON lines with a `prompt` and, where it is known, the `answer`."
)
_INTERACTIVE = flags.DEFINE_bool("interactive", False, "Read prompts from standard input, one a line.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Prompts of --prompts that are continued together.", lower_bound=1)
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
flags.mark_flag_as_required("workdir")


def main() -> None:
    decoding = Decoding(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value, _MIN_P.value, _PENALTY.value)
    if (_PROMPT.value is not None) + (_PROMPTS.value is not None) + _INTERACTIVE.value != 1:
        raise UserError("give one of --prompt, --prompts and --interactive")
    if _SCORE.value and _PROMPT.value is None:
        raise UserError("--score goes with --prompt")
    questions = _read_prompts() if _PROMPTS.value is not None else []
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
    result = {"run": _WORKDIR.value, "step": run.step, "retrieval": database is not None or bool(given)}
    if _SCORE.value:
        result |= {"prompt": _PROMPT.value, **_score(run, database, source, given)}
    else:
        sampling = Sampling(run, database, source, given, decoding)
        if _PROMPT.value is not None:
            result |= sampling.tell(_PROMPT.value)
        elif questions:
            result |= sampling.ask(questions)
        else:
            result["results"] = [sampling.tell(prompt) for prompt in _lines_of_input()]
    if not result["retrieval"]:
        print("\nno retrieval (OFF)", file=sys.stderr)
    if _OUTPUT.value:
        write_json(_OUTPUT.value, result)


class Sampling:
    """One sampler for all prompts, and where it finds neighbours."""

    def __init__(self, run: TrainedRun, database, source: dict[str, Any], given: dict, decoding: Decoding) -> None:
        self._run, self._database, self._given, self._decoding = run, database, given, decoding
        self._sampler = Sampler(
            run.config.model,
            run.plan,
            run.params,
            vocab_size=run.tokenizer.vocab_size,
            retrieval_step=_RETRIEVAL_STEP.value,
            left_pad=_LEFT_PAD.value,
            **source,
        )

    def tell(self, prompt: str) -> dict[str, Any]:
        """Continues one prompt and prints: a single continuation as it comes, several one below the other."""
        single = _SAMPLES.value == 1
        if single:
            print(prompt, end="", flush=True)
        (samples,) = self._continue([prompt], lambda piece: print(piece, end="", flush=True) if single else None)
        for number, sample in enumerate(samples, start=1):
            if not single:
                print(f"\nsample {number}\n{prompt}{sample['continuation']}", end="")
            print()
            _show(sample)
        sys.stdout.flush()
        return {"prompt": prompt, **samples[0], "samples": samples}

    def ask(self, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Continues many prompts, some at a time, and counts continuations that begin with the answer they should."""
        results, right, asked = [], 0, 0
        for first in range(0, len(questions), _BATCH_SIZE.value):
            some = questions[first : first + _BATCH_SIZE.value]
            for question, samples in zip(some, self._continue([each["prompt"] for each in some]), strict=True):
                for sample in samples:
                    verdict = ""
                    if "answer" in question:
                        sample["right"] = begins_with(sample["continuation"], question["answer"])
                        asked, right = asked + 1, right + sample["right"]
                        verdict = f"  [{'right' if sample['right'] else 'wrong, ' + question['answer']}]"
                    print(f"{question['prompt']}{sample['continuation']}{verdict}", flush=True)
                results.append({**question, "samples": samples})
        if asked:
            print(f"\n{right} of {asked} answers are right ({right / asked:.1%})")
        return {"results": results, "asked": asked, "right": right}

    def _continue(
        self, prompts: Sequence[str], tell: Callable[[str], None] = lambda piece: None
    ) -> list[list[dict[str, Any]]]:
        """The samples of each prompt: continuation, neighbours, failed retrievals. `tell` gets each piece of text."""
        self._follow()
        tokenizer, count = self._run.tokenizer, _SAMPLES.value
        requests = [
            Request(tokenizer.encode(prompt), sample=number, given=self._given)
            for prompt in prompts
            for number in range(count)
        ]
        streams = [TextStream(tokenizer, _STOP.value) for _ in requests]
        texts, retrieved = [""] * len(requests), [[] for _ in requests]

        def add(index: int, piece: str) -> None:
            texts[index] += piece
            tell(piece)

        for index, sampled in self._sampler.generate_batch(
            requests,
            max_new_tokens=_TOKENS.value,
            decoding=self._decoding,
            stop=lambda index, _: streams[index].stopped,
        ):
            retrieved[index] += sampled.retrieved
            add(index, streams[index].push(sampled.token))
        for index, stream in enumerate(streams):
            add(index, stream.close())
        samples = [
            {"continuation": text, **_found(chunks, self._database, self._run)}
            for text, chunks in zip(texts, retrieved, strict=True)
        ]
        return [samples[first : first + count] for first in range(0, len(samples), count)]

    def _follow(self) -> None:
        """From here on neighbours come from what the database is now."""
        if self._database is None:
            return
        try:
            changed = self._database.refresh()
        except (UserError, OSError):
            if _ON_FAILURE.value == "error":
                raise
            return  # every chunk asks again, and tells why it has no neighbours
        if changed:
            self._run.check_tokenizer(self._database.tokenizer_fingerprint, "the changed database")
            print("the database has changed", file=sys.stderr)


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
    found = _found(retrieved, database, run)
    _show(found)
    return {"tokens": pieces, "log_probabilities": scores, **found}


def _read_prompts() -> list[dict[str, Any]]:
    questions = []
    for number, line in enumerate(Path(_PROMPTS.value).read_bytes().splitlines(), start=1):
        try:
            question = json.loads(line)
            for text in (question["prompt"], question.get("answer", "")):
                text.encode()  # a string, and valid
        except (ValueError, KeyError, TypeError, AttributeError):
            expected = '{"prompt": "text", "answer": "text"}'
            raise UserError(f"{_PROMPTS.value}:{number}: expected JSON as {expected}") from None
        questions.append(question)
    if not questions:
        raise UserError(f"{_PROMPTS.value}: there is no prompt in it")
    return questions


def _lines_of_input() -> Iterator[str]:
    """Lines of standard input that are not empty, as they come."""
    for line in sys.stdin.buffer:
        try:
            prompt = line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text") from None
        if prompt:
            yield prompt


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


def _found(chunks: Sequence[RetrievedChunk], database, run: TrainedRun) -> dict[str, Any]:
    """The neighbours of each chunk with their source, and why a chunk has none, for the JSON file."""
    return {
        "neighbours": [entry for chunk in chunks for entry in _describe(chunk, database, run)],
        "failures": [{"chunk": chunk.chunk + 1, "reason": chunk.failure} for chunk in chunks if chunk.failure],
    }


def _show(found: dict[str, Any]) -> None:
    """Prints what `_found` gives."""
    for entry in found["neighbours"]:
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
    for failure in found["failures"]:
        print(f"\nchunk {failure['chunk']} went on without neighbours (OFF): {failure['reason']}")


def _describe(chunk: RetrievedChunk, database, run: TrainedRun) -> list[dict[str, Any]]:
    length, pad = run.config.model.chunk_length, run.config.model.pad_id
    entries = []
    # Given neighbours are of no document, and a service that has failed must not be asked for those of none.
    documents = database.documents(chunk.ids) if (chunk.ids >= 0).any() else [("", "")] * len(chunk.ids)
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
