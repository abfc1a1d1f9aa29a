"""Questions answered by greedy decoding, and how many of the answers are right (paper section 4.3)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from retro_jax.data.answer_rows import RowLayout, RowWriter
from retro_jax.data.answers import exact_match, f1
from retro_jax.data.questions import Question
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.progress import Progress
from retro_jax.training.trained import TrainedRun

MODES = ("baseline", "off", "on")
HEADER = ("run", "step", "mode", "passages read", "in the prompt", "EM", "F1", "questions")


class Answerer:
    """A trained run that answers questions laid out as those it was fine-tuned on."""

    def __init__(self, run: TrainedRun, layout: RowLayout, *, batch_size: int = 32) -> None:
        """Lays the model out for generation.

        Args:
          run: baseline or RETRO.
          layout: of prompt and passages; an answer is at most M tokens.
          batch_size: questions that are answered together.

        Raises:
          UserError: the layout has other chunks or neighbours than the model.
        """
        model = run.config.model
        for name in ("chunk_length", "neighbour_length"):
            wanted, given = getattr(model, name), getattr(layout, name)
            if wanted != given and not (model.is_baseline and name == "neighbour_length"):
                raise UserError(f"{run.workdir}: its model has {name} {wanted}, the layout of the questions {given}")
        self._layout, self._batch_size = layout, batch_size
        self._tokenizer = run.tokenizer
        self._rows = RowWriter(run.tokenizer, layout)
        self._sampler = Sampler(
            model,
            run.plan,
            run.params,
            vocab_size=run.tokenizer.vocab_size,
            retriever=None,
            neighbours=max(layout.passages, 1),
            max_context=layout.prompt_length + layout.chunk_length,
            mesh=run.mesh,
            left_pad=True,
        )

    def answer(self, questions: Sequence[Question], *, on: bool) -> list[str]:
        """The answer to each question: the most probable tokens up to the end token, at most M.

        Args:
          questions: with their passages.
          on: RETRO[ON], with passages as neighbours; not for a baseline.
        """
        answers: list[str] = []
        with Progress(f"answers, {'on' if on else 'off'}", total=len(questions), unit="questions") as progress:
            for first in range(0, len(questions), self._batch_size):
                some = questions[first : first + self._batch_size]
                tokens: list[list[int]] = [[] for _ in some]
                for index, token in self._sampler.generate_batch(
                    [self._request(question, on) for question in some],
                    max_new_tokens=self._layout.chunk_length,
                    decoding=Decoding(temperature=0),
                ):
                    tokens[index].append(token.token)
                answers += [self._tokenizer.decode(each).strip() for each in tokens]
                progress.update(len(some))
        return answers

    def _request(self, question: Question, on: bool) -> Request:
        prompt = self._rows.prompt(question)
        if not on:
            return Request(prompt)
        last = len(prompt) // self._layout.chunk_length  # of the chunks of prompt and start token, padded on the left
        return Request(prompt, given={last: self._rows.neighbours(question)})


def default_modes(run: TrainedRun) -> tuple[str, ...]:
    """The one of MODES that a run was fine-tuned in."""
    if run.config.model.is_baseline:
        return ("baseline",)
    return ("on",) if run.config.cca_gate else ("off",)


def evaluate_answers(
    run: TrainedRun,
    layout: RowLayout,
    questions: Sequence[Question],
    modes: Sequence[str] = (),
    *,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Answers questions in each mode; a JSON-serialisable result for each.

    Args:
      run: what answers.
      layout: how the questions are laid out.
      questions: with passages and reference answers.
      modes: of MODES; none for the one that the run was fine-tuned in.
      batch_size: questions that are answered together.

    Raises:
      UserError: a mode that the run does not have; passages asked of the encoder where the layout has none.
    """
    modes = tuple(modes) or default_modes(run)
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if (mode == "baseline") != run.config.model.is_baseline:
            kind = "a baseline" if run.config.model.is_baseline else "a RETRO"
            raise UserError(f"{run.workdir} is {kind} and has no mode {mode!r}")
        if mode == "on" and not layout.passages:
            raise UserError(f"{run.workdir}: mode 'on' needs passages for the encoder, the layout has none")
    answerer = Answerer(run, layout, batch_size=batch_size)
    results = []
    for mode in modes:
        given = answerer.answer(questions, on=mode == "on")
        scored = [_scored(question, answer) for question, answer in zip(questions, given, strict=True)]
        results.append(
            {
                "run": str(run.workdir),
                "step": run.step,
                "mode": mode,
                "layout": dataclasses.asdict(layout),
                "passages_read": layout.passages if mode == "on" else 0,
                "exact_match": sum(each["exact_match"] for each in scored) / len(scored),
                "f1": sum(each["f1"] for each in scored) / len(scored),
                "questions": len(scored),
                "answers": scored,
            }
        )
    return results


def best_step(results: Sequence[dict[str, Any]]) -> int:
    """The step with the most exact matches: early stopping as Wang et al. (2023) do it.

    Of several the one with the larger F1, then the earliest. Of results in several modes the first one's count.
    """
    results = [result for result in results if result["mode"] == results[0]["mode"]]
    return min(results, key=lambda result: (-result["exact_match"], -result["f1"], result["step"]))["step"]


def table(results: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> str:
    """A Markdown table, one row a result; `names` in place of the runs' directories."""
    rows = [HEADER]
    for number, result in enumerate(results):
        rows.append(
            (
                names[number] if names else result["run"],
                str(result["step"]),
                result["mode"],
                str(result["passages_read"]),
                str(result["layout"]["passages_in_prompt"]),
                f"{100 * result['exact_match']:.1f} %",
                f"{100 * result['f1']:.1f} %",
                f"{result['questions']:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def _scored(question: Question, answer: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "answers": list(question.answers),
        "prediction": answer,
        "exact_match": exact_match(answer, question.answers),
        "f1": f1(answer, question.answers),
    }
