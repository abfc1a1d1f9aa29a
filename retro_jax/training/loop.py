"""The run, from top to bottom: workdir, devices, data, model, state, steps."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from retro_jax.config import TrainConfig
from retro_jax.data.batches import Batches
from retro_jax.data.sequences import SequenceSource
from retro_jax.data.tokenizer import BOS_ID, PAD_ID
from retro_jax.errors import UserError
from retro_jax.parallel import rules
from retro_jax.parallel.mesh import create_mesh
from retro_jax.progress import Progress
from retro_jax.training.checkpoint import Checkpoints
from retro_jax.training.metrics import MetricsWriter
from retro_jax.training.optimizer import create_optimizer, learning_rate
from retro_jax.training.state import initialise, plan_model, plan_state
from retro_jax.training.step import make_train_step
from retro_jax.training.workdir import CHECKPOINTS, open_workdir


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended: steps finished, last loss in nats per token, stopped by SIGTERM or at the end."""

    step: int
    loss: float
    terminated: bool


def train(config: TrainConfig, workdir: str | os.PathLike) -> TrainResult:
    """Trains, or goes on training, the run of a workdir.

    The same call after an interruption (SIGKILL at any moment included) goes on from the newest complete checkpoint
    with the same examples and, on the same machine and mesh, the same bits.

    Args:
      config: the run.
      workdir: its directory; created when absent, refused when it belongs to another configuration.

    Raises:
      UserError: anything the user can mend, before any long work starts; or the loss is not finite.
    """
    # 1. Devices
    mesh = create_mesh(config.mesh)
    _check_batch(config, mesh)

    # 2. Data
    sources = [SequenceSource(directory) for directory in config.data.sequences]
    _check_data(config, sources)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, length=sources[0].schema.length))
    rows = _process_rows(config.batch_size)
    batches = Batches(
        sources,
        batch_size=config.batch_size,
        seed=config.data.seed,
        weights=list(config.data.weights) or None,
        rows=rows,
    )

    # 3. Model and optimizer: shapes and shardings only
    plan = plan_model(config.model, mesh)
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    schedule = learning_rate(config.optimizer, config.steps)
    abstract = plan_state(plan, optimizer, mesh)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plan.params))

    # 4. Workdir and state: the newest checkpoint, or fresh
    workdir = open_workdir(workdir, config, sources[0].tokenizer_path)
    with contextlib.ExitStack() as resources:
        checkpoints = resources.enter_context(Checkpoints(workdir / CHECKPOINTS, config.checkpoint))
        first = checkpoints.latest_step or 0
        if first:
            state, data = checkpoints.restore(abstract, first)
            batches.check_state(data)
        else:
            state = initialise(config.model, plan, optimizer, mesh, config.seed)
        print(
            f"{size:,} parameters, mesh {dict(mesh.shape)}, {sum(map(len, sources)):,} sequences of "
            f"{sources[0].schema.length} tokens, {'from step ' + str(first) if first else 'fresh'} to {config.steps}",
            flush=True,
        )

        # 5. Steps. The host looks at the metrics of step n after step n + 1 is dispatched: the device never waits.
        step_fn = make_train_step(config, plan, optimizer, mesh, unscored=(PAD_ID, BOS_ID))
        writer = resources.enter_context(MetricsWriter(workdir, resumed_step=first))
        log = _Log(config, writer, schedule, checkpoints, batches)
        stream = resources.enter_context(batches.iterate(first * config.batch_size))
        termination = resources.enter_context(_TerminationFlag())
        progress = resources.enter_context(Progress("training", total=config.steps, unit="steps", initial=first))
        step = first
        for step in range(first + 1, config.steps + 1):
            batch = next(stream)
            state, metrics = step_fn(state, _to_devices(batch, config, mesh))
            log.resolve()
            log.push(step, metrics, stream.wait_seconds)
            progress.note(f"loss {log.last_loss:.4f}, {log.tokens_per_second:,.0f} tokens/s")
            progress.update(1)
            if termination.raised or step % config.checkpoint.every_steps == 0 or step == config.steps:
                log.resolve()  # a state behind a loss that is not finite is never saved
                checkpoints.save(step, state, batches.state(step * config.batch_size))
            if termination.raised:
                break
    return TrainResult(step, log.last_loss, terminated=step < config.steps)


class _Log:
    """Metrics of the step in flight, written once the next one is dispatched."""

    def __init__(
        self, config: TrainConfig, writer: MetricsWriter, schedule: Any, checkpoints: Checkpoints, batches: Batches
    ) -> None:
        self._config = config
        self._writer = writer
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._batches = batches
        self._pending: tuple[int, dict[str, jax.Array], float] | None = None
        self._last_time = time.monotonic()
        self._last_wait = 0.0
        self._steps_since = 0
        self._tokens_since = 0.0
        self.last_loss = float("nan")
        self.tokens_per_second = 0.0

    def push(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        self._pending = (step, metrics, waited)

    def resolve(self) -> None:
        """Fetches the pending metrics, stops on a loss that is not finite, writes every `log_every` steps."""
        if self._pending is None:
            return
        step, metrics, waited = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.last_loss = values["loss"]
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            self._stop(step, values)
        self._steps_since += 1
        self._tokens_since += values["tokens"]
        now = time.monotonic()
        self.tokens_per_second = self._tokens_since / max(now - self._last_time, 1e-9)
        if step % self._config.log_every and step != self._config.steps:
            return
        self._writer.write(
            step,
            {
                "loss": values["loss"],
                "gradient_norm": values["gradient_norm"],
                "learning_rate": float(self._schedule(step - 1)),
                "examples_seen": step * self._config.batch_size,
                "tokens_per_second": self.tokens_per_second,
                "data_wait_seconds": (waited - self._last_wait) / self._steps_since,
            },
        )
        self._last_time, self._last_wait, self._steps_since, self._tokens_since = now, waited, 0, 0.0

    def _stop(self, step: int, values: dict[str, float]) -> None:
        self._checkpoints.wait()
        good = self._checkpoints.latest_step
        first = (step - 1) * self._config.batch_size
        origins = [self._batches.origin(first + row) for row in range(self._config.batch_size)]
        records = ", ".join(f"{self._config.data.sequences[origin.source]}:{origin.index}" for origin in origins)
        raise UserError(
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; the batch was examples "
            f"{first} to {first + self._config.batch_size - 1}: records {records}; "
            f"last good checkpoint: {'none' if good is None else f'step {good}'}; "
            f"lower optimizer.peak_learning_rate or look at this batch"
        )


class _TerminationFlag:
    """Notes a SIGTERM, so that the step in progress ends and is saved."""

    raised = False

    def __enter__(self) -> "_TerminationFlag":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: object) -> None:
        self.raised = True


def _to_devices(batch: dict[str, np.ndarray], config: TrainConfig, mesh: Mesh) -> dict[str, jax.Array]:
    local = {"tokens": batch["tokens"]}
    if not config.model.is_baseline:
        local["neighbours"] = batch["neighbours"][:, :, : config.data.neighbours]
    sharding = rules.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array, (config.batch_size, *array.shape[1:]))
        for name, array in local.items()
    }


def _process_rows(batch_size: int) -> tuple[int, int]:
    share = batch_size // jax.process_count()
    return jax.process_index() * share, (jax.process_index() + 1) * share


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % split:
        raise UserError(f"batch_size {config.batch_size} is not a multiple of the mesh's data x fsdp = {split}")


def _check_data(config: TrainConfig, sources: list[SequenceSource]) -> None:
    if not sources:
        raise UserError("data.sequences is empty; name the output of tools/write_sequences.py")
    for directory, source in zip(config.data.sequences, sources, strict=True):
        schema, model = source.schema, config.model
        if schema.vocab_size > model.vocab_size:
            raise UserError(
                f"{directory}: its tokenizer has {schema.vocab_size} tokens, model.vocab_size is {model.vocab_size}"
            )
        if schema.chunk_length != model.chunk_length or (
            not model.is_baseline and schema.neighbour_length != model.neighbour_length
        ):
            raise UserError(
                f"{directory}: chunks of {schema.chunk_length} and neighbours of {schema.neighbour_length} tokens, the "
                f"model has chunk_length {model.chunk_length} and neighbour_length {model.neighbour_length}"
            )
        if not model.is_baseline and schema.neighbours < config.data.neighbours:
            raise UserError(
                f"{directory}: {schema.neighbours} neighbours a chunk, data.neighbours is {config.data.neighbours}"
            )
        length = config.data.length or sources[0].schema.length
        if schema.length != length:
            raise UserError(f"{directory}: sequences of {schema.length} tokens, expected {length}")
        if source.tokenizer_fingerprint != sources[0].tokenizer_fingerprint:
            raise UserError(f"{directory}: another tokenizer than that of {config.data.sequences[0]}")
