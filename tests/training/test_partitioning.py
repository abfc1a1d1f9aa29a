"""How the presets are split over a mesh, held to what is on record: a change that adds an all-gather is seen here.

After a change that is meant, write the record again and look at the difference:

    python tests/training/test_partitioning.py
"""

import json
import os
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.config import DataConfig, MeshConfig, RetroConfig, TrainConfig
from retro_jax.model.chunked_cross_attention import Memory, cca_positions
from retro_jax.parallel import rules
from retro_jax.parallel.costs import collectives, traffic
from retro_jax.parallel.hlo import parse
from retro_jax.parallel.layout import sharding_table
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.inputs import abstract_batch
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.state import named_axes, named_params, plan_model, plan_state
from retro_jax.training.step import make_train_step

RECORD = Path(__file__).parent / "data"
COLLECTIVES = RECORD / "collectives.json"
# Splitting is done before the code is generated, so that need not be good.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
PRESETS = ("tiny", "172m", "425m", "1.5b", "7.5b")
# Layers in a loop are compiled once, so the paper's sizes differ from each other in their layer plans alone.
CASES = [("tiny", "data=2,fsdp=2,tensor=2"), ("tiny", "fsdp=2,tensor=2,context=2"), *((p, "fsdp=8") for p in PRESETS)]
ALWAYS = {("tiny", "fsdp=2,tensor=2,context=2"), ("172m", "fsdp=8")}


def mesh_config(mesh):
    return MeshConfig(**{"fsdp": 1} | {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))})


def counted(preset, mesh):
    """Collective instructions of the compiled train step by kind, as they stand in the program."""
    model = RetroConfig.preset(preset, dtype="bfloat16", remat="block", scan_layers=True)
    devices = create_mesh(mesh_config(mesh))
    config = TrainConfig(
        model=model, data=DataConfig(length=128), batch_size=8, mesh=mesh_config(mesh), vocab_block=16384
    )
    plan = plan_model(model, devices)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    step = make_train_step(config, plan, optimizer, devices, unscored=(0, 1))
    batch = abstract_batch(config, rules.batch_sharding(devices))
    compiled = step.lower(plan_state(plan, optimizer, devices), batch).compile(compiler_options=QUICK)
    found = traffic(collectives(parse(compiled.as_text())))
    return {kind: sums.instructions for kind, sums in sorted(found.items())}


def table(preset):
    plan = plan_model(RetroConfig.preset(preset), create_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    return sharding_table(named_params(plan), named_axes(plan)) + "\n"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_of_a_preset_is_split_as_recorded(preset):
    assert table(preset) == (RECORD / f"shardings-{preset}.txt").read_text()


@pytest.mark.parametrize(
    ("preset", "mesh"),
    [pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.slow]) for case in CASES],
)
def test_the_step_of_a_preset_communicates_as_recorded(preset, mesh):
    assert counted(preset, mesh) == json.loads(COLLECTIVES.read_text())[f"{preset} {mesh}"]


def local_parts():
    """Collectives of encoder and of one CCA, by kind, where each of eight devices has one chunk of the sequence."""
    config = RetroConfig.preset("tiny")
    mesh = create_mesh(MeshConfig(fsdp=1, context=8))
    plan = plan_model(config, mesh)
    B, T, D, E = 2, 8 * config.chunk_length, config.width, config.encoder_width
    shape = (B, 8, 2, config.neighbour_length)
    split = NamedSharding(mesh, P(None, "context"))
    hidden = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=split)
    valid = jax.ShapeDtypeStruct((B, T), bool, sharding=split)
    retrieved = jax.ShapeDtypeStruct((*shape, E), jnp.float32, sharding=split)
    retrieved_valid = jax.ShapeDtypeStruct(shape, bool, sharding=split)

    def encode(params, retrieved, retrieved_valid, hidden, valid):
        with rules.use(mesh):
            return plan.merge(params).encoder(retrieved, retrieved_valid, hidden, valid).values

    def attend(params, hidden, retrieved, retrieved_valid):
        with rules.use(mesh):
            cca = plan.merge(params).decoder.entry.cca
            return cca(hidden, Memory(retrieved, retrieved_valid), cca_positions(config, config.neighbour_length))

    return [
        traffic(
            collectives(
                parse(
                    jax.jit(function, out_shardings=split)
                    .lower(plan.params, *arguments)
                    .compile(compiler_options=QUICK)
                    .as_text()
                )
            )
        )
        for function, arguments in (
            (encode, (retrieved, retrieved_valid, hidden, valid)),
            (attend, (hidden, retrieved, retrieved_valid)),
        )
    ]


def test_encoder_and_cca_of_a_split_sequence_are_local_but_for_the_shift():
    encoder, cca = local_parts()
    assert encoder == {}
    # The last tokens of a chunk belong to the attending chunk before the next one, which lies on the next device.
    assert set(cca) == {"collective-permute"}


if __name__ == "__main__":
    RECORD.mkdir(exist_ok=True)
    for preset in PRESETS:
        (RECORD / f"shardings-{preset}.txt").write_text(table(preset))
    COLLECTIVES.write_text(
        json.dumps({f"{preset} {mesh}": counted(preset, mesh) for preset, mesh in CASES}, indent=2) + "\n"
    )
