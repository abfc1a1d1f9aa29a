"""Answers are those of a loop over the full forward pass, and right and wrong ones are counted."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from small_run import MODEL, SAMPLE, VOCAB, M

from retro_jax.config import MeshConfig, TrainConfig
from retro_jax.data.answer_rows import RowLayout, RowWriter
from retro_jax.data.questions import Passage, Question
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, train_tokenizer
from retro_jax.errors import UserError
from retro_jax.evaluation.question_answering import Answerer, best_step, default_modes, evaluate_answers, table
from retro_jax.model.retro import Retro
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.state import plan_model
from retro_jax.training.trained import TrainedRun

R = 2 * M
LAYOUT = RowLayout(5, 2, 1, M, R)  # RETRO++: a passage in the prompt, the others as neighbours


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A RETRO of random parameters, large enough that logits differ."""
    path = tmp_path_factory.mktemp("run")
    texts = [document.text for document in read_documents([SAMPLE])]
    tokenizer = train_tokenizer(texts, path / "tokenizer.model", vocab_size=VOCAB)
    mesh = create_mesh(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    plan = plan_model(MODEL, mesh)
    _, params = nnx.split(Retro(MODEL, rngs=nnx.Rngs(5)))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan.params)
    params = jax.device_put(jax.tree.map(lambda leaf: leaf * 3, params), shardings)
    return TrainedRun(path, TrainConfig(model=MODEL), tokenizer, mesh, plan, params, 7)


@pytest.fixture(scope="module")
def questions():
    words = next(iter(read_documents([SAMPLE]))).text.split()
    text = lambda first, count: " ".join(words[first : first + count])  # noqa: E731
    return [
        Question(
            str(size),
            text(10 * size, size),
            ("nothing",),
            passages=tuple(Passage(text(rank, 1), text(size + 9 * rank, 12)) for rank in range(size % 4)),
        )
        for size in (1, 2, 3, 4, 9)
    ]


def greedy(run, layout, question, *, on, forward):
    """Tokens up to the end token, each the most probable one behind those before it; all computed anew every time."""
    writer, P = RowWriter(run.tokenizer, layout), layout.prompt_length
    tokens = writer.row(question, "x")[None, : P + M].copy()
    tokens[0, P:] = PAD_ID
    near = np.zeros((1, layout.prompt_chunks + 1, layout.passages, R), np.int32)
    near[0, layout.prompt_chunks - 1] = writer.neighbour_rows(question)
    for place in range(P, P + M):
        logits = np.array(forward(tokens, near if on else None)[0, place - 1])
        logits[[PAD_ID, BOS_ID, UNK_ID]] = -np.inf
        tokens[0, place] = logits.argmax()
        if tokens[0, place] == EOS_ID:
            return tokens[0, P:place]
    return tokens[0, P:]


def test_answers_of_a_batch_equal_a_full_forward_loop_on_and_off(run, questions):
    forward = jax.jit(run.plan.merge(run.params))
    answerer = Answerer(run, LAYOUT, batch_size=4)
    expected = {
        on: [
            run.tokenizer.decode(greedy(run, LAYOUT, question, on=on, forward=forward)).strip()
            for question in questions
        ]
        for on in (True, False)
    }
    for on in (True, False):
        assert answerer.answer(questions, on=on) == expected[on]
    assert expected[True] != expected[False]


def test_right_answers_are_counted_and_the_best_step_has_most(run, questions, monkeypatch):
    given = [f"answer {question.id}" for question in questions]
    monkeypatch.setattr(Answerer, "answer", lambda self, questions, *, on: given)
    asked = list(questions)
    asked[1] = dataclasses.replace(asked[1], answers=("no", "The answer 2!"))
    (result,) = evaluate_answers(run, LAYOUT, asked)
    assert (result["mode"], result["step"], result["questions"]) == ("on", 7, 5)
    assert result["exact_match"] == result["f1"] == pytest.approx(1 / 5)
    assert result["answers"][1]["exact_match"] and result["answers"][1]["f1"] == 1
    assert [each["prediction"] for each in result["answers"]] == given
    lines = table([result]).splitlines()
    assert len(lines) == 3 and "| on " in lines[2] and f"{100 * result['exact_match']:.1f} %" in lines[2]
    figures = (
        (30, "on", 0.5, 0.6),
        (20, "on", 0.5, 0.6),
        (10, "on", 0.5, 0.5),
        (5, "on", 0.1, 0.9),
        (1, "off", 1.0, 1.0),
    )
    results = [dict(zip(("step", "mode", "exact_match", "f1"), each, strict=True)) for each in figures]
    assert best_step(results) == 20


def test_what_does_not_go_together_is_refused(run, questions):
    assert default_modes(run) == ("on",)
    shut = dataclasses.replace(run.config, init_from="x", unfreeze_decoder=True, cca_gate=0)
    assert default_modes(dataclasses.replace(run, config=shut)) == ("off",)
    for change, modes, message in (
        ({}, ("baseline",), "is a RETRO and has no mode 'baseline'"),
        ({}, ("onn",), "mode 'onn' is none of baseline, off, on"),
        ({"passages": 0}, ("on",), "mode 'on' needs passages for the encoder"),
        ({"chunk_length": 2 * M}, (), "its model has chunk_length 8, the layout of the questions 16"),
        ({"neighbour_length": M}, (), "its model has neighbour_length 16, the layout of the questions 8"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_answers(run, dataclasses.replace(LAYOUT, **change), questions, modes)
