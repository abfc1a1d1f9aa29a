"""The run, from top to bottom: devices, data, model, workdir, compiling, state, steps."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from flax import nnx

from retro_jax.config import TrainConfig
from retro_jax.data.batches import Batches
from retro_jax.data.sequences import SequenceSource
from retro_jax.errors import UserError
from retro_jax.parallel import hosts, rules
from retro_jax.parallel.layout import check_coverage, sharding_table
from retro_jax.parallel.mesh import check_batch, create_mesh
from retro_jax.progress import Progress
from retro_jax.training import goodput, retrofit
from retro_jax.training.checkpoint import Checkpoints
from retro_jax.training.goodput import Ledger
from retro_jax.training.inputs import abstract_batch, check_data, to_devices
from retro_jax.training.log import StepLog
from retro_jax.training.loss import unscored_labels
from retro_jax.training.metrics import MetricsWriter, read_validations
from retro_jax.training.optimizer import create_optimizer
from retro_jax.training.profile import ProfileWindow
from retro_jax.training.retrofit import Base
from retro_jax.training.state import initialise, named_axes, named_params, plan_model, plan_state
from retro_jax.training.step import make_train_step
from retro_jax.training.validation import Validation
from retro_jax.training.workdir import (
    CHECKPOINTS,
    SHARDINGS,
    claim_workdir,
    note_going_back,
    open_workdir,
    went_back_to,
)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended: steps finished, last loss in nats per token, stopped by SIGTERM or at the end."""

    step: int
    loss: float
    terminated: bool


def train(
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    resume_from: int | None = None,
    profile: tuple[int, int] | None = None,
    profile_all: bool = False,
    began: float | None = None,
    base: Base | None = None,
) -> TrainResult:
    """Trains, or goes on training, the run of a workdir.

    The same call after an interruption (SIGKILL at any moment included) goes on from the newest complete checkpoint
    with the same examples and, on the same machine and mesh, the same bits. All processes of a run make it.

    Args:
      config: the run.
      workdir: its directory; created when absent, refused when it belongs to another configuration or is in use.
      resume_from: goes back to the checkpoint of this step, once, and removes the newer ones.
      profile: first step and number of steps that the profiler records into `<workdir>/profile`.
      profile_all: in every process, not the first alone.
      began: `time.time()` when the program was started, for the ledger; now by default.
      base: the model of `config.init_from`. All of its parameters are read at the first start alone; once there is a
        checkpoint, it need not be there any more (`retrofit.known_base`).

    Raises:
      UserError: anything the user can mend, before any long work starts; too little memory; or too many bad steps.
    """
    began = time.time() if began is None else began

    # 1. Devices
    mesh = create_mesh(config.mesh)
    sharding = rules.batch_sharding(mesh)

    # 2. Data
    if (base is None) == bool(config.init_from):
        raise ValueError("a base goes with config.init_from, and only with it")
    if base is not None:
        config = retrofit.resolve(config, base.config)
    sources = [SequenceSource(directory) for directory in config.data.sequences]
    if base is not None and sources:
        base.check_tokenizer(sources[0].tokenizer_fingerprint, config.data.sequences[0])
    held_out = [SequenceSource(directory) for directory in config.validation.sequences]
    check_data(config, sources, held_out)
    stored = {"length": sources[0].schema.length, "prompt": sources[0].prompt_length}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **stored))
    check_batch(config, mesh)
    batches = Batches(
        sources,
        batch_size=config.batch_size,
        seed=config.data.seed,
        weights=list(config.data.weights) or None,
        rows=hosts.batch_rows(sharding, config.batch_size),
    )

    # 3. Model and optimizer: shapes and shardings only
    plan = plan_model(config.model, mesh, retrofit.trains(config))
    optimizer = create_optimizer(config.optimizer, config.steps, plan.axes)
    abstract = plan_state(plan, optimizer, mesh)
    check_coverage(named_params(plan), mesh)
    table = sharding_table(named_params(plan), named_axes(plan))
    size, trained = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (plan.params, plan.split(plan.params)[0])
    )
    unscored = unscored_labels(config.model)

    with contextlib.ExitStack() as resources:
        # 4. Workdir: locked, and the right one. The other processes wait until the first has opened it.
        workdir, primary = Path(workdir), hosts.is_primary()
        resources.enter_context(_named_memory())
        if primary:
            resources.enter_context(claim_workdir(workdir))
            open_workdir(workdir, config, sources[0].tokenizer_path, base and base.record())
            (workdir / SHARDINGS).write_text(table + "\n", encoding="utf-8")
        hosts.agree(0, "workdir")
        checkpoints = resources.enter_context(Checkpoints(workdir / CHECKPOINTS, config.checkpoint))
        newest = hosts.agree(checkpoints.latest_step or 0, "newest checkpoint")
        first = hosts.agree(_first_step(checkpoints, newest, workdir, resume_from), "first step")
        validations = {line["step"]: line["validation_loss"] for line in read_validations(workdir)}
        for step, loss in validations.items():
            checkpoints.note_loss(step, loss)
        ledger = resources.enter_context(Ledger(workdir, began, write=primary))

        # 5. Compiling: too little memory shows here
        step_fn = make_train_step(config, plan, optimizer, mesh, unscored=unscored)
        if first < config.steps:
            with ledger.measure("compile"):
                run_step = step_fn.lower(abstract, abstract_batch(config, sharding)).compile()
                hosts.barrier("compiled")

        # 6. State: that of a checkpoint, or fresh
        if first:
            state, data, validated = checkpoints.restore(abstract, first, went_back_to=went_back_to(workdir))
            batches.check_state(data)
            _discard_newer(checkpoints, first, newest, workdir, resume_from)
        elif base is not None:
            state, validated = retrofit.begin(config, plan, optimizer, mesh, base), None
        else:
            state, validated = initialise(config.model, plan, optimizer, mesh, config.seed), None
        ledger.resume(first)
        if primary:
            if mesh.size > 1:
                print(table)
            frozen = f", {trained:,} of them trained" if trained < size else ""
            print(
                f"{size:,} parameters{frozen}, mesh {dict(mesh.shape)}, {sum(map(len, sources)):,} sequences of "
                f"{config.data.length} tokens, {f'from step {first}' if first else 'fresh'} to {config.steps}",
                flush=True,
            )
        writer = resources.enter_context(MetricsWriter(workdir, resumed_step=first)) if primary else None
        log = StepLog(config, batches, ledger, writer, checkpoints.wait_for_latest)
        validation = Validation(config, plan, mesh, held_out, unscored=unscored) if held_out else None

        def validate(step: int, params: nnx.State, stopping: Callable[[], bool]) -> float | None:
            """Once at every step where it is due."""
            if validation is None or (step % config.validation.every_steps and step != config.steps):
                return None
            log.resolve()
            with ledger.measure("eval"):
                losses = validation.measure(params, stopping)
            if losses is None:
                return None
            log.write_validation(step, losses)
            return losses["validation_loss"]

        hosts.barrier("ready")  # a collective waits for the other processes for half a minute only
        if first and not hosts.agree(validated is not None or first in validations, "validated"):
            # The start before this one was stopped between the step and its validation.
            checkpoints.note_loss(first, validate(first, state.params, lambda: False))
        ledger.enter(first, rest="init")

        # 7. Steps. The host looks at the metrics of step n after step n + 1 is dispatched: the device never waits.
        # Nothing is copied there but what is meant to be: the guard makes anything else an error.
        stream = resources.enter_context(batches.iterate(first * config.batch_size))
        stop = resources.enter_context(_Stop())
        progress = resources.enter_context(Progress("training", total=config.steps, unit="steps", initial=first))
        window = range(first + 1, config.steps + 1)
        profiler = resources.enter_context(ProfileWindow(workdir, profile if primary or profile_all else None, window))
        last_save, step = time.monotonic(), first
        for step in window:
            with ledger.measure("data"):
                arrays = next(stream)
            batch = to_devices(arrays, batches.rows, config.batch_size, config, sharding)
            with profiler.before(step), jax.transfer_guard("disallow"):
                state, metrics = run_step(state, batch)
                log.resolve()
            log.push(step, metrics)
            profiler.after(step, metrics)
            progress.note(f"loss {log.last_loss:.4f}, {log.tokens_per_second:,.0f} tokens/s")
            progress.update(1)
            loss = None if stop.asked_for() else validate(step, state.params, stop.asked_for)
            if (
                stop.known
                or step % config.checkpoint.every_steps == 0
                or step == config.steps
                or _minutes_passed(config, step, last_save)
            ):
                log.resolve()  # a state behind a step that stops the run is never saved
                with ledger.measure("save"):
                    checkpoints.save(step, state, batches.state(step * config.batch_size), loss)
                last_save = time.monotonic()
            if stop.known:
                break

        # 8. The end: the last save is on disk, the time is accounted for
        with ledger.measure("save"):
            checkpoints.wait()
        ledger.enter(step)
        if primary:
            print(goodput.in_words(goodput.summarise(workdir)), flush=True)
    return TrainResult(step, log.last_loss, terminated=step < config.steps)


def _first_step(checkpoints: Checkpoints, newest: int, workdir: Path, resume_from: int | None) -> int:
    """Step to go on from: that of the newest checkpoint, or the one that was asked for and not gone back to before."""
    if resume_from is None:
        return newest
    if went_back_to(workdir) == resume_from:
        if hosts.is_primary():
            print(
                f"--resume_from={resume_from} was followed before: going on from the newest checkpoint, step {newest}; "
                f"to go back once more, remove the newer checkpoints",
                file=sys.stderr,
            )
        return newest
    if resume_from not in checkpoints.steps:
        there = ", ".join(map(str, checkpoints.steps)) or "none"
        raise UserError(f"--resume_from={resume_from}: no checkpoint of this step in {workdir}; there are {there}")
    return resume_from


def _discard_newer(checkpoints: Checkpoints, first: int, newest: int, workdir: Path, resume_from: int | None) -> None:
    """Once the checkpoint that was asked for is read, the newer ones would only be in its way."""
    if first < newest:
        removed = checkpoints.discard_after(first)
        if hosts.is_primary():
            steps = ", ".join(map(str, removed))
            print(f"going back to step {first}; removed the newer checkpoints: {steps}", file=sys.stderr)
    if first == resume_from and hosts.is_primary():
        note_going_back(workdir, first)


def _minutes_passed(config: TrainConfig, step: int, last_save: float) -> bool:
    """Whether a save is due by the clock of the first process; looked at when a line is written."""
    if not config.checkpoint.every_minutes or step % config.log_every:
        return False
    return bool(hosts.agree(time.monotonic() - last_save >= 60 * config.checkpoint.every_minutes, "minutes passed"))


@contextlib.contextmanager
def _named_memory() -> Iterator[None]:
    """Turns the exhaustion of a device's memory into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):  # the CPU says the latter
            raise
        raise UserError(
            f"too little device memory ({' '.join(str(error).split())[:200]}); raise mesh.fsdp or microbatches, or let "
            f"model.remat keep less; tools/plan_topology.py tells what fits"
        ) from error


class _Stop:
    """Notes a SIGTERM, so that the step in progress ends and is saved.

    Attributes:
      known: `asked_for` has been True.
    """

    known = False
    _raised = False

    def asked_for(self) -> bool:
        """Whether any process was told to stop; the same answer in all, which ask equally often."""
        self.known = self.known or hosts.should_stop(self._raised)
        return self.known

    def __enter__(self) -> "_Stop":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, *_: object) -> None:
        self._raised = True
