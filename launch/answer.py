"""Answers questions with a fine-tuned run and counts the right answers: exact match and F1 as for SQuAD.

    python launch/answer.py --workdir=runs/answers --examples=questions/test.jsonl --output=answers.json
    python launch/answer.py --workdir=runs/answers --examples=questions/dev.jsonl --steps=all
    python launch/answer.py --workdir=runs/answers --examples=questions/test.jsonl --modes=on,off

Decoding is greedy, to the end token or a chunk of tokens. Questions are laid out as those that the run was fine-tuned
on (tools/write_answers.py): with passages for the encoder (on), without (off, baseline), with passages in the prompt or
without. --modes takes others than the one it was fine-tuned in. With several --steps the one with most exact matches is
named: choose it on dev, and give it for test.
"""

from pathlib import Path
from typing import Any

from absl import flags

from retro_jax import program
from retro_jax.data.answer_rows import RowLayout, stored_layout
from retro_jax.data.questions import Question, read_questions, some_of
from retro_jax.errors import UserError
from retro_jax.evaluation.question_answering import best_step, evaluate_answers, table
from retro_jax.files import write_json
from retro_jax.training.checkpoint import saved_steps
from retro_jax.training.trained import TrainedRun, load_trained
from retro_jax.training.workdir import CHECKPOINTS

_WORKDIR = flags.DEFINE_list("workdir", None, "Fine-tuned runs.", required=True)
_EXAMPLES = flags.DEFINE_string("examples", None, "Questions with answers and passages.", required=True)
_MODES = flags.DEFINE_list("modes", [], "baseline, or off and on; that of the fine-tuning by default.")
_STEPS = flags.DEFINE_list("steps", [], "Checkpoints, or all of those that are kept; the newest by default.")
_SEQUENCES = flags.DEFINE_string(
    "sequences", None, "Output of tools/write_answers.py whose layout is taken; by default what the run was trained on."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Answer so many questions alone, drawn by a hash of each.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Questions that are answered together.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file with every answer.")


def main() -> None:
    questions = list(read_questions(_EXAMPLES.value))
    if _LIMIT.value:
        questions = some_of(questions, _LIMIT.value)
    results: list[dict[str, Any]] = []
    best: dict[str, int] = {}
    for workdir in _WORKDIR.value:
        own = []
        for step in _steps(workdir):
            own += _evaluate(load_trained(workdir, step=step), questions)
        best[workdir] = best_step(own)
        results += own
    print(table(results))
    if _STEPS.value:
        for workdir, step in best.items():
            print(f"{workdir}: most exact matches at step {step}")
    if _OUTPUT.value:
        write_json(_OUTPUT.value, {"examples": _EXAMPLES.value, "results": results, "best_steps": best})


def _evaluate(run: TrainedRun, questions: list[Question]) -> list[dict[str, Any]]:
    return evaluate_answers(run, _layout(run), questions, _MODES.value, batch_size=_BATCH_SIZE.value)


def _steps(workdir: str) -> list[int | None]:
    if _STEPS.value == ["all"]:
        return list(saved_steps(Path(workdir) / CHECKPOINTS))
    try:
        return [int(step) for step in _STEPS.value] or [None]
    except ValueError:
        raise UserError(f"--steps={','.join(_STEPS.value)}: expected numbers of steps, or all") from None


def _layout(run: TrainedRun) -> RowLayout:
    sequences = _SEQUENCES.value or next(iter(run.config.data.sequences), "")
    try:
        layout = stored_layout(sequences)
    except UserError as error:
        if _SEQUENCES.value:
            raise
        raise UserError(f"{error}; --sequences names those that say how questions are laid out") from None
    if layout is None:
        raise UserError(f"{sequences} was not written by tools/write_answers.py; give --sequences=DIR that was")
    return layout


if __name__ == "__main__":
    program.run(main)
