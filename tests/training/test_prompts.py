"""Sequences with a prompt: loss on the answer alone, neighbours of its last chunk alone, padding that nothing sees."""

import dataclasses

import jax
import numpy as np
import pytest
from small_run import MODEL, M

from retro_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig, ValidationConfig
from retro_jax.data.sequences import SequenceSource
from retro_jax.errors import UserError
from retro_jax.parallel import rules
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.flops import processed_tokens
from retro_jax.training.inputs import abstract_batch, check_data, to_devices
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.state import initialise, plan_model
from retro_jax.training.step import make_train_step
from retro_jax.training.validation import Validation

CHUNKS, K = 3, 2  # of the prompt, and neighbours
P, T = CHUNKS * M, CHUNKS * M + M
PAD, BOS, EOS = 0, 1, 2


def example(seed, prompt, answer):
    """Features of a sequence with so many tokens in prompt and answer, as `write_answers` lays them out."""
    generator = np.random.default_rng(seed)
    tokens = np.zeros(T + 1, np.int32)
    tokens[P - prompt : P] = [BOS, *generator.integers(4, 600, prompt - 1)]
    tokens[P : P + answer] = [*generator.integers(4, 600, answer - 1), EOS]
    neighbours = np.zeros((CHUNKS + 1, K, 2 * M), np.int32)
    neighbours[CHUNKS - 1] = generator.integers(4, 600, (K, 2 * M))
    neighbours[CHUNKS - 1, 1, 11:] = PAD
    return {"tokens": tokens, "neighbours": neighbours}


EXAMPLES = [example(seed, prompt, answer) for seed, (prompt, answer) in enumerate([(5, 3), (P, M), (M + 1, 1), (M, 5)])]
STACKED = {name: np.stack([each[name] for each in EXAMPLES]) for name in EXAMPLES[0]}


class Source:
    """Stored sequences, as far as validation reads them."""

    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, number):
        return EXAMPLES[number]


def trained(**data):
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(sequences=("x",), length=T, prompt=P, neighbours=K, **data),
        validation=ValidationConfig(sequences=("x",)),
        optimizer=OptimizerConfig(warmup_steps=1),
        steps=2,
        batch_size=len(EXAMPLES),
    )
    mesh = create_mesh(MeshConfig(), jax.devices()[:1])
    plan = plan_model(config.model, mesh)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    state = initialise(config.model, plan, optimizer, mesh, seed=3)
    return config, mesh, plan, optimizer, state


@pytest.fixture(scope="module")
def losses():
    """Nats [B, T] of every label by the whole forward pass with all chunks' neighbours, and OFF."""
    *_, plan, _, state = trained()
    model = plan.merge(state.params)
    forward, found = jax.jit(model), []
    for neighbours in (STACKED["neighbours"], None):
        logits = np.asarray(forward(STACKED["tokens"][:, :-1], neighbours), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found.append(-np.take_along_axis(log_p, STACKED["tokens"][:, 1:, None], -1)[..., 0])
    return found


def mean_over(nats, first):
    """Over labels that are tokens `first` and on, PAD and BOS left out."""
    labels = STACKED["tokens"][:, 1:]
    scored = (np.arange(1, T + 1) >= first) & (labels != PAD) & (labels != BOS)
    return nats[scored].mean(), scored.sum()


@pytest.mark.parametrize(("score_prompt", "first"), [(False, P), (True, 0)])
def test_the_step_counts_the_answers_labels_or_all(losses, score_prompt, first):
    config, mesh, plan, optimizer, state = trained(score_prompt=score_prompt)
    step = make_train_step(config, plan, optimizer, mesh, unscored=(PAD, BOS))
    batch = to_devices(STACKED, range(4), 4, config, rules.batch_sharding(mesh))
    assert {name: array.shape for name, array in batch.items()} == {
        name: spec.shape for name, spec in abstract_batch(config, rules.batch_sharding(mesh)).items()
    }
    assert batch["tokens"].shape == (4, T) and batch["neighbours"].shape == (4, 1, K, 2 * M)
    _, metrics = step(state, batch)
    expected, count = mean_over(losses[0], first)
    assert int(metrics["tokens"]) == count
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_validation_is_the_same_mean_on_and_off(losses):
    config, mesh, plan, _, state = trained()
    found = Validation(config, plan, mesh, [Source()], unscored=(PAD, BOS)).measure(state.params)
    assert found["validation_loss"] == pytest.approx(mean_over(losses[0], P)[0], rel=1e-5)
    assert found["validation_loss_off"] == pytest.approx(mean_over(losses[1], P)[0], rel=1e-5)
    assert abs(found["validation_loss"] - found["validation_loss_off"]) > 1e-4


def test_a_padded_row_in_a_batch_equals_the_row_alone_without_padding(losses):
    """OFF the row has no padding at all; ON it begins at a chunk's border, where the tokens allow it."""
    *_, plan, _, state = trained()
    forward = jax.jit(plan.merge(state.params))
    for number, size in enumerate((5, P, M + 1, M)):
        tokens = EXAMPLES[number]["tokens"]
        rows = [(tokens[P - size : -1], None, losses[1][number, P - size :])]
        if size % M == 0:
            near = EXAMPLES[number]["neighbours"][CHUNKS - size // M :]
            rows.append((tokens[P - size : -1], near[None], losses[0][number, P - size :]))
        for own, near, expected in rows:
            logits = np.asarray(forward(own[None], near), np.float64)[0]
            labels = np.append(own[1:], tokens[-1])
            nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(own)), labels]
            scored = labels != PAD
            np.testing.assert_allclose(nats[scored], expected[scored], atol=2e-5)


def test_what_the_encoder_reads_is_one_chunks_neighbours():
    config = trained()[0]
    assert processed_tokens(config) == 4 * (T - 1 + K * 2 * M)


def test_data_with_another_prompt_or_a_context_axis_is_refused(small_data):
    source = SequenceSource(small_data.sequences)
    config = TrainConfig(model=MODEL, data=DataConfig(sequences=(str(source.directory),), prompt=M))
    with pytest.raises(UserError, match=f"prompts of 0 tokens, expected {M}"):
        check_data(config, [source], [])
    source.prompt_length = M
    context = dataclasses.replace(config, mesh=MeshConfig(context=2))
    with pytest.raises(UserError, match=r"are not cut by mesh\.context"):
        check_data(context, [source], [])
    check_data(config, [source], [])
