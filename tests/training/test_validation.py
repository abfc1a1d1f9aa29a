"""The validation loss is the mean over the first sequences, whatever the devices and the batches."""

import dataclasses

import jax
import numpy as np
import pytest
from small_run import MODEL

from retro_jax.config import DataConfig, MeshConfig, TrainConfig, ValidationConfig
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.tokenizer import BOS_ID, PAD_ID
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.state import initialise, plan_model
from retro_jax.training.validation import Validation

EXAMPLES = 11  # no multiple of any batch


@pytest.fixture(scope="module")
def source(small_data):
    return SequenceSource(small_data.sequences)


def measured(source, mesh_config, model=MODEL, devices=8, sources=1, examples=EXAMPLES, **changes):
    """The losses with parameters of one seed."""
    directories = (str(source.directory),) * sources
    config = TrainConfig(
        model=model,
        data=DataConfig(sequences=directories, length=source.schema.length),
        validation=ValidationConfig(sequences=directories, examples=examples),
        **{"batch_size": 8, **changes},
    )
    mesh = create_mesh(mesh_config, jax.devices()[:devices])
    plan = plan_model(model, mesh)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    state = initialise(model, plan, optimizer, mesh, seed=5)
    validation = Validation(config, plan, mesh, [source] * sources, unscored=(PAD_ID, BOS_ID))
    return validation.measure(state.params), plan.merge(state.params)


@pytest.fixture(scope="module")
def one_device(source):
    return measured(source, MeshConfig(), devices=1, batch_size=1)


def test_it_is_the_mean_over_the_scored_labels_of_the_first_sequences(source, one_device):
    losses, model = one_device
    forward = jax.jit(model)
    for name, neighbours in (("validation_loss", True), ("validation_loss_off", False)):
        nats = []
        for number in range(EXAMPLES):
            example = source[number]
            tokens = example["tokens"][None]
            logits = forward(tokens[:, :-1], example["neighbours"][None] if neighbours else None)
            log_p = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)), np.float64)[0]
            labels = tokens[0, 1:]
            scored = (labels != PAD_ID) & (labels != BOS_ID)
            nats += list(-log_p[np.arange(len(labels)), labels][scored])
        assert losses[name] == pytest.approx(np.mean(nats), rel=1e-6)


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        (MeshConfig(), {"batch_size": 8}),
        (MeshConfig(data=2, fsdp=2, tensor=2), {"batch_size": 24, "microbatches": 2}),
        (MeshConfig(fsdp=2, context=4), {"batch_size": 16, "vocab_block": 100}),
    ],
)
def test_mesh_batch_and_vocabulary_blocks_do_not_show(source, one_device, mesh, changes):
    losses, _ = measured(source, mesh, **changes)
    assert losses == pytest.approx(one_device[0], rel=1e-6)


def test_a_baseline_has_one_loss_and_several_data_sets_are_read_in_order(source):
    baseline = dataclasses.replace(MODEL, cca_layers=())
    one, _ = measured(source, MeshConfig(), model=baseline, examples=0)
    two, _ = measured(source, MeshConfig(), model=baseline, examples=0, sources=2)
    assert one.keys() == {"validation_loss"} and two == pytest.approx(one, rel=1e-6)
    first, _ = measured(source, MeshConfig(), model=baseline, sources=2)
    assert first == measured(source, MeshConfig(), model=baseline)[0] != one


def test_with_the_gate_shut_it_is_of_what_is_trained(source, one_device):
    losses, _ = measured(source, MeshConfig(), cca_gate=0)
    assert losses.keys() == {"validation_loss"}
    assert losses["validation_loss"] == pytest.approx(one_device[0]["validation_loss_off"], rel=1e-6)
    assert losses["validation_loss"] != pytest.approx(one_device[0]["validation_loss"], rel=1e-5)
