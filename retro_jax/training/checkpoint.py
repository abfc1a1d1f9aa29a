"""Checkpoints of a run: Orbax, asynchronous, complete or not there, and known to hold what was saved.

A checkpoint of step s lies in `<directory>/<s>/` with the items `params` and `optimizer` (plain nested dicts of
arrays) and a record in its metadata: the state of the data (a few hundred bytes), the validation loss where there is
one, and shape, type and digest of every array. All of it is committed by one rename. What is loaded must have the
digests of the record, so a flipped bit, a file cut short and a file that is missing are all recognised.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from retro_jax.config import CheckpointConfig
from retro_jax.data.stage import fingerprint
from retro_jax.errors import UserError
from retro_jax.parallel import hosts
from retro_jax.training.digest import digests
from retro_jax.training.state import TrainState, from_nested_dict, to_nested_dict

_KEEP = ocp.training.preservation_policies


class Restored(NamedTuple):
    """What a checkpoint holds: the train state, the state of the data, the validation loss of this step if any."""

    state: TrainState
    data: dict[str, Any]
    validation_loss: float | None


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes the same calls."""

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig) -> None:
        """Opens or creates the directory and removes what an interrupted save left.

        Kept are the newest, those whose step is a multiple of `keep_every`, and those of the best validation losses.
        """
        self._losses: dict[int, float] = {}
        policies: list[Any] = [_KEEP.LatestN(config.keep_last)]
        if config.keep_every:
            policies.append(_KEEP.EveryNSteps(config.keep_every))
        if config.keep_best:
            policies.append(_LowestLoss(config.keep_best, self._losses))
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            preservation_policy=_KEEP.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        for step in self.steps if config.keep_best else []:
            with contextlib.suppress(_DamagedError):  # told when it is the one to be restored
                self.note_loss(step, _record(self._checkpointer, step)["validation_loss"])

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    def save(self, step: int, state: TrainState, data: dict[str, Any], validation_loss: float | None = None) -> None:
        """Starts saving in the background; waits for the save before it, whose failure is raised here.

        Args:
          step: finished optimizer steps.
          state: of this step.
          data: state of the data, plain JSON.
          validation_loss: of this step's parameters, in nats per token, where it was measured.

        Raises:
          UserError: the disk is full or not writable. The checkpoints before it are untouched.
        """
        items = _items(state)
        record = {"data": data, "validation_loss": validation_loss, "arrays": _describe(items)}
        self._losses.pop(step, None)  # of another state, which the run went back behind
        self.note_loss(step, validation_loss)
        with _named_writes(self._checkpointer.directory):
            self._checkpointer.save_checkpointables_async(
                step, items, force=True, custom_metadata={**record, "seal": fingerprint(record)}
            )

    def note_loss(self, step: int, loss: float | None) -> None:
        """Lets a loss that was not known when the checkpoint of `step` was saved decide whether it is of the best.

        In all processes, or they would not remove the same ones. None and what is not finite is no loss.
        """
        if loss is not None and math.isfinite(loss):
            self._losses[step] = loss

    def restore(self, abstract: TrainState, step: int, *, went_back_to: int | None = None) -> Restored:
        """Reads a checkpoint into the shardings of `abstract`.

        Args:
          abstract: shapes and shardings.
          step: which one.
          went_back_to: a step for which --resume_from is used up, so that it is no remedy for damage.

        Raises:
          UserError: it is damaged, or of another configuration.
        """
        damaged = self._checkpointer.directory / str(step)

        def remedy(earlier: int) -> str:
            if earlier == went_back_to:
                return f"remove {damaged}, and the run goes on from the one before it, step {earlier}"
            return f"--resume_from={earlier} takes the one before it"

        items, record = _load(self._checkpointer, step, _items(abstract), remedy)
        return Restored(_state(abstract, items), record["data"], record["validation_loss"])

    def discard_after(self, step: int) -> list[int]:
        """Removes all checkpoints newer than `step`, the newest first, and gives their steps."""
        newer = [other for other in reversed(self.steps) if other > step]
        for other in newer:
            self._checkpointer.delete(other)
            self._losses.pop(other, None)
        return newer

    def wait(self) -> None:
        """Returns when the save in progress, if any, is on disk."""
        with _named_writes(self._checkpointer.directory):
            self._checkpointer.wait()

    def wait_for_latest(self) -> int | None:
        """Step of the newest complete checkpoint, that of the save in progress included."""
        self.wait()
        return self.latest_step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Waits for the save in progress. Its failure is raised, unless something else already is."""
        if kind is None:
            with _named_writes(self._checkpointer.directory):
                self._checkpointer.close()
        else:
            with contextlib.suppress(Exception):
                self._checkpointer.close()


def load_params(directory: str | os.PathLike, abstract: nnx.State, step: int | None = None) -> tuple[nnx.State, int]:
    """Parameters alone, for evaluation and sampling.

    Args:
      directory: of the run's checkpoints.
      abstract: parameters with shardings, as in `ModelPlan.params`.
      step: which checkpoint; the newest by default.

    Returns:
      The parameters and the step they are from.

    Raises:
      UserError: there is no checkpoint, or not this one, or it is damaged or of another configuration.
    """
    directory = Path(directory).absolute()
    step = _saved_step(directory, step)
    with ocp.training.Checkpointer(directory) as checkpointer:
        wanted = {"params": to_nested_dict(abstract)}
        items, _ = _load(checkpointer, step, wanted, lambda earlier: f"--step={earlier} takes the one before it")
    return from_nested_dict(abstract, items["params"]), step


def open_params(
    directory: str | os.PathLike, abstract: nnx.State, step: int | None = None
) -> Callable[[tuple[str | int, ...]], jax.Array]:
    """As `load_params`, without reading the parameters yet.

    Returns:
      Gives the array at a path of `nnx.to_flat_state(abstract)`, read from disk at every call and kept by nobody;
      raises UserError where it is damaged.
    """
    directory = Path(directory).absolute()
    step = _saved_step(directory, step)
    leaves = dict(nnx.to_flat_state(abstract))

    def remedy(earlier: int) -> str:
        return f"{directory / str(earlier)} is the one before it"

    with ocp.training.Checkpointer(directory) as checkpointer, _damage_told(checkpointer, step, remedy):
        record = _record(checkpointer, step)
        _check_shapes(directory / str(step), record["arrays"], {"params": to_nested_dict(abstract)})
    partly = ocp.Context()
    partly.pytree.loading.partial_load = True

    def read(path: tuple[str | int, ...]) -> jax.Array:
        wanted = {"params": to_nested_dict(nnx.from_flat_state([(path, leaves[path])]))}
        with (
            ocp.training.Checkpointer(directory, context=partly) as checkpointer,
            _damage_told(checkpointer, step, remedy),
        ):
            (array,) = jax.tree.leaves(_arrays(checkpointer, step, wanted, record))
        return array

    return read


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending, at least one.

    Raises:
      UserError: there is none.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise UserError(f"{directory}: no checkpoints here; train first")
    with ocp.training.Checkpointer(directory) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    if not steps:
        raise UserError(f"{directory}: no complete checkpoint here; train first")
    return steps


def _saved_step(directory: Path, step: int | None) -> int:
    """The step, or the newest; raises UserError where it is not there."""
    steps = saved_steps(directory)
    if step is not None and step not in steps:
        raise UserError(f"{directory}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


class _DamagedError(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


@dataclasses.dataclass(frozen=True)
class _LowestLoss:
    """Keeps the checkpoints with the lowest of the losses known so far; Orbax's BestN reads a file without a seal."""

    count: int
    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        known = [checkpoint.step for checkpoint in checkpoints if checkpoint.step in self.losses]
        best = sorted(known, key=self.losses.__getitem__)[: self.count]
        return [checkpoint.step in best for checkpoint in checkpoints]


def _items(state: TrainState) -> dict[str, Any]:
    """Parameters apart from the rest, so that evaluation reads a third."""
    return {"params": to_nested_dict(state.params), "optimizer": to_nested_dict(_rest(state))}


def _state(like: TrainState, items: dict[str, Any]) -> TrainState:
    rest = from_nested_dict(_rest(like), items["optimizer"])
    return TrainState(params=from_nested_dict(like.params, items["params"]), **rest)


def _rest(state: TrainState) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(state) if field.name != "params"]
    return {name: getattr(state, name) for name in names}


def _describe(items: dict[str, Any]) -> dict[str, list[Any]]:
    """[digest, type, shape] of every array."""
    arrays = _flat(items)
    found = digests(arrays)
    return {name: [found[name], str(array.dtype), list(array.shape)] for name, array in arrays.items()}


def _flat(items: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in items.items():
        flat.update(_flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {prefix + name: item})
    return flat


def _load(
    checkpointer: ocp.training.Checkpointer, step: int, wanted: dict[str, Any], remedy: Callable[[int], str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The wanted items and the record; `remedy` says how to get the checkpoint of an earlier step instead."""
    with _damage_told(checkpointer, step, remedy):
        record = _record(checkpointer, step)
        _check_shapes(checkpointer.directory / str(step), record["arrays"], wanted)
        return _arrays(checkpointer, step, wanted, record), record


def _arrays(
    checkpointer: ocp.training.Checkpointer, step: int, wanted: dict[str, Any], record: dict[str, Any]
) -> dict[str, Any]:
    """The wanted items, which have the digests of the record."""
    items = _readable(lambda: dict(checkpointer.load_checkpointables(step, dict(wanted))))
    hosts.barrier("loaded")  # the digests cross the devices, where a process is waited for but for a short time
    for name, digest in digests(_flat(items)).items():
        if digest != record["arrays"][name][0]:
            raise _DamagedError(f"{name} is not what was saved")
    return items


@contextlib.contextmanager
def _damage_told(checkpointer: ocp.training.Checkpointer, step: int, remedy: Callable[[int], str]) -> Iterator[None]:
    """Turns damage into one line with a way out."""
    try:
        yield
    except _DamagedError as error:
        earlier = [other.step for other in checkpointer.checkpoints if other.step < step]
        way_out = remedy(earlier[-1]) if earlier else "there is none before it"
        raise UserError(f"{checkpointer.directory / str(step)}: damaged checkpoint ({error}); {way_out}") from error


def _record(checkpointer: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    found = _readable(lambda: dict(checkpointer.checkpointables_metadata(step).custom_metadata))
    record = {name: value for name, value in found.items() if name != "seal"}
    if found.get("seal") != fingerprint(record):
        raise _DamagedError("its metadata is not what was saved")
    return record


def _readable(read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Runs a reading function of Orbax, which meets damage with exceptions of many kinds."""
    _hush_abandoned_reads()
    try:
        return read()
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # of the devices, the memory or another process
    except Exception as error:
        origin: BaseException = error  # Orbax guesses at a wrong handler; what it met first is the reason
        while origin.__cause__ or origin.__context__:
            origin = origin.__cause__ or origin.__context__
        reason = re.sub(r'Error opening "\w+" driver: | \[tensorstore_spec.*', "", " ".join(str(origin).split()))
        raise _DamagedError(f"cannot be read: {reason[:300]}") from error


@functools.cache
def _hush_abandoned_reads() -> None:
    """Orbax stops at the first array that it cannot read; the reads of the others then complain on stderr, each."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _check_shapes(checkpoint: os.PathLike, saved: dict[str, list[Any]], wanted: dict[str, Any]) -> None:
    now = {name: [str(array.dtype), list(array.shape)] for name, array in _flat(wanted).items()}
    then = {name: rest for name, (_, *rest) in saved.items() if name.split(".", 1)[0] in wanted}
    different = [
        f"{name} {_in_words(then.get(name))} (the configuration: {_in_words(now.get(name))})"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"{checkpoint}: checkpoint of another configuration; it has {', '.join(different[:3])}{more}; "
            f"give the configuration it was trained with"
        )


def _in_words(description: list[Any] | None) -> str:
    return f"{description[0]} {description[1]}" if description else "not there"


@contextlib.contextmanager
def _named_writes(directory: os.PathLike) -> Iterator[None]:
    """Turns a failed write into one line that names the directory."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError) and "No space left" not in reason and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise UserError(
            f"{directory}: checkpoint not written ({reason[:300]}); earlier checkpoints are kept, "
            f"free space and run the same command again"
        ) from error
