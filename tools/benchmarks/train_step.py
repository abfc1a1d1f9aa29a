"""Times our train step in a process of its own: `python -m benchmarks.train_step JSON`."""

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import measure
from retro_jax import program
from retro_jax.config import TrainConfig, from_dict
from retro_jax.data.batches import Batches
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.tokenizer import UNK_ID
from retro_jax.parallel import rules
from retro_jax.parallel.mesh import check_batch, create_mesh
from retro_jax.training.flops import peak_flops
from retro_jax.training.inputs import abstract_batch, check_data, to_devices
from retro_jax.training.loss import unscored_labels
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.retrofit import trains
from retro_jax.training.state import initialise, plan_model, plan_state
from retro_jax.training.step import make_train_step

_POOL = 4


def main(arguments: list[str]) -> None:
    job = json.loads(arguments[0])
    cores = measure.limit_cores(job["cores"])
    if job["cpu_devices"]:
        jax.config.update("jax_num_cpu_devices", job["cpu_devices"])
    config = from_dict(TrainConfig, job["config"])
    mesh = create_mesh(config.mesh)
    check_batch(config, mesh)
    with _batches(config, mesh) as batches:  # opened first: what does not suit the model is said before compiling
        result = _time(config, mesh, batches, job)
    device = jax.devices()[0]
    measure.report(
        {
            **result,
            **_device_memory(),
            "mesh": dict(mesh.shape),
            "devices": mesh.size,
            "device_kind": device.device_kind,
            "platform": device.platform,
            "peak_flops": peak_flops(device.device_kind, config.model.dtype),
            "cores": cores,
        }
    )


def _time(
    config: TrainConfig, mesh: Mesh, batches: Iterator[dict[str, jax.Array]], job: dict[str, Any]
) -> dict[str, Any]:
    plan = plan_model(config.model, mesh, trains(config))
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    step = make_train_step(config, plan, optimizer, mesh, unscored=unscored_labels(config.model))
    begun = time.perf_counter()
    compiled = step.lower(
        plan_state(plan, optimizer, mesh), abstract_batch(config, rules.batch_sharding(mesh))
    ).compile()
    compile_seconds, compile_peak = time.perf_counter() - begun, measure.peak_memory_bytes()
    state = initialise(config.model, plan, optimizer, mesh, seed=config.seed)
    trained, _ = plan.split(plan.params)

    def run(batch: dict[str, jax.Array]) -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)

    return {
        **measure.time_steps(run, batches, warmup=job["warmup"], steps=job["steps"]),
        "compile_seconds": compile_seconds,
        "compile_peak_memory_bytes": compile_peak,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
    }


@contextlib.contextmanager
def _batches(config: TrainConfig, mesh: Mesh) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Endless batches on the devices: of `data.sequences`, or random ones that lie in memory."""
    rows, sharding = range(config.batch_size), rules.batch_sharding(mesh)

    def place(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return to_devices(arrays, rows, config.batch_size, config, sharding)

    if not config.data.sequences:
        yield map(place, itertools.cycle(_random_batches(config)))
        return
    sources = [SequenceSource(directory) for directory in config.data.sequences]
    check_data(config, sources, [])
    order = Batches(sources, batch_size=config.batch_size, seed=config.data.seed, weights=config.data.weights or None)
    with order.iterate() as stream:
        yield map(place, stream)


def _random_batches(config: TrainConfig) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    model, data = config.model, config.data
    shapes = {
        "tokens": (config.batch_size, data.length + 1),
        "neighbours": (
            config.batch_size,
            data.length // model.chunk_length,
            data.neighbours,
            model.neighbour_length,
        ),
    }
    return [
        {name: generator.integers(UNK_ID + 1, model.vocab_size, shape, np.int32) for name, shape in shapes.items()}
        for _ in range(_POOL)
    ]


def _device_memory() -> dict[str, Any]:
    """The most that any device of this process had in use; nothing on a CPU, where the process's own size counts."""
    peaks = [device.memory_stats()["peak_bytes_in_use"] for device in jax.local_devices() if device.platform != "cpu"]
    return {"peak_memory_bytes": max(peaks)} if peaks else {}


if __name__ == "__main__":
    program.run(main, positional=True)
