"""Speed, as one JSON line a result: training steps on synthetic batches, and reading of real sequences.

    python tools/benchmark.py train --preset=tiny --batch_size=4 --length=512
    python tools/benchmark.py data --sequences=demo/sequences --batch_size=32

`train` measures a RETRO and then the baseline with the same decoder in the same process, and gives their ratio; `data`
measures how fast batches are read, shuffled and stacked. Without a name both run (`data` when there are sequences).
"""

import dataclasses
import json
import platform
import statistics
import time

import jax
import numpy as np
from absl import flags

from retro_jax import program
from retro_jax.config import OptimizerConfig, RetroConfig, TrainConfig
from retro_jax.data.batches import Batches
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.tokenizer import BOS_ID, PAD_ID
from retro_jax.errors import UserError
from retro_jax.parallel import rules
from retro_jax.parallel.mesh import create_mesh
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.state import initialise, plan_model
from retro_jax.training.step import make_train_step

BENCHMARKS = ("train", "data")

_PRESET = flags.DEFINE_string("preset", "tiny", "Architecture of `train`.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Compute dtype of `train`.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Sequences of a step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a synthetic sequence.", lower_bound=64)
_K = flags.DEFINE_integer("k", 2, "Neighbours of a chunk.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps measured, after two that warm up.", lower_bound=1)
_SEQUENCES = flags.DEFINE_string("sequences", None, "Sequences directory of `data`.")


def main(names: list[str]) -> None:
    chosen = names or (["train", "data"] if _SEQUENCES.value else ["train"])
    for name in chosen:
        if name not in BENCHMARKS:
            raise UserError(f"benchmark {name!r} is none of {', '.join(BENCHMARKS)}")
    if "train" in chosen:
        benchmark_train()
    if "data" in chosen:
        benchmark_data()


def benchmark_train() -> None:
    config = RetroConfig.preset(_PRESET.value, dtype=_DTYPE.value)
    if config.is_baseline:
        raise UserError("--preset names a RETRO; its baseline is measured with it")
    seconds = {}
    for name, model in (("retro", config), ("baseline", dataclasses.replace(config, cca_layers=()))):
        seconds[name] = _step_seconds(model)
    median = statistics.median(seconds["retro"])
    tokens = _BATCH_SIZE.value * _LENGTH.value
    _report(
        "train",
        preset=_PRESET.value,
        dtype=_DTYPE.value,
        batch_size=_BATCH_SIZE.value,
        length=_LENGTH.value,
        k=_K.value,
        step_seconds_median=median,
        step_seconds_p90=float(np.quantile(seconds["retro"], 0.9)),
        target_tokens_per_second=tokens / median,
        processed_tokens_per_second=tokens * (1 + _K.value * config.neighbour_length / config.chunk_length) / median,
        baseline_step_seconds_median=statistics.median(seconds["baseline"]),
        step_time_ratio_to_baseline=median / statistics.median(seconds["baseline"]),
    )


def _step_seconds(model: RetroConfig) -> list[float]:
    config = TrainConfig(model=model, optimizer=OptimizerConfig(warmup_steps=1), batch_size=_BATCH_SIZE.value)
    mesh = create_mesh(config.mesh)
    plan = plan_model(model, mesh)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    state = initialise(model, plan, optimizer, mesh, seed=0)
    step = make_train_step(config, plan, optimizer, mesh, unscored=(PAD_ID, BOS_ID))
    generator = np.random.default_rng(0)
    chunks = _LENGTH.value // model.chunk_length
    shapes = {"tokens": (_BATCH_SIZE.value, _LENGTH.value + 1)}
    if not model.is_baseline:
        shapes["neighbours"] = (_BATCH_SIZE.value, chunks, _K.value, model.neighbour_length)
    batch = {
        name: jax.device_put(
            generator.integers(4, model.vocab_size, shape).astype(np.int32), rules.batch_sharding(mesh)
        )
        for name, shape in shapes.items()
    }
    seconds = []
    for _ in range(_STEPS.value + 2):
        begun = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begun)
    return seconds[2:]


def benchmark_data() -> None:
    if not _SEQUENCES.value:
        raise UserError("the benchmark `data` needs --sequences, the output of tools/write_sequences.py")
    source = SequenceSource(_SEQUENCES.value)
    batches = Batches([source], batch_size=_BATCH_SIZE.value, seed=0)
    count = max(20, 2000 // _BATCH_SIZE.value)
    with batches.iterate() as stream:
        next(stream)
        begun = time.perf_counter()
        for _ in range(count):
            next(stream)
        seconds = time.perf_counter() - begun
    sequences = count * _BATCH_SIZE.value
    _report(
        "data",
        batch_size=_BATCH_SIZE.value,
        length=source.schema.length,
        k=source.schema.neighbours,
        sequences_per_second=sequences / seconds,
        target_tokens_per_second=sequences * source.schema.length / seconds,
    )


def _report(name: str, **values: object) -> None:
    device = jax.devices()[0]
    line = {
        "benchmark": name,
        **values,
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    program.run(main, positional=True)
