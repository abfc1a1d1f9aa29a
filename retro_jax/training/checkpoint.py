"""Checkpoints of a run: Orbax, asynchronous, complete or not there.

A checkpoint of step s lies in `<directory>/<s>/` with the items `params` and `optimizer` (plain nested dicts of
arrays) and, in its metadata, the state of the data: a few hundred bytes of JSON.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from flax import nnx
from orbax.checkpoint import v1 as ocp

from retro_jax.config import CheckpointConfig
from retro_jax.errors import UserError
from retro_jax.training.state import TrainState, from_nested_dict, to_nested_dict

_KEEP = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one run, oldest removed as new ones come."""

    def __init__(self, directory: str | os.PathLike, config: CheckpointConfig) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            preservation_policy=_KEEP.LatestN(config.keep_last),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving in the background; waits for the save before it, whose failure is raised here.

        Raises:
          UserError: the disk is full or not writable. The checkpoints before it are untouched.
        """
        items = {
            "params": to_nested_dict(state.params),
            "optimizer": to_nested_dict({"step": state.step, "state": state.opt_state}),
        }
        with _named_failure(self._checkpointer.directory):
            self._checkpointer.save_checkpointables_async(step, items, force=True, custom_metadata=data)

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint into the shardings of `abstract`; returns the state and the data's state."""
        wanted = {
            "params": to_nested_dict(abstract.params),
            "optimizer": to_nested_dict({"step": abstract.step, "state": abstract.opt_state}),
        }
        items = _load(self._checkpointer, step, wanted)
        rest = from_nested_dict({"step": abstract.step, "state": abstract.opt_state}, items["optimizer"])
        params = from_nested_dict(abstract.params, items["params"])
        return TrainState(rest["step"], params, rest["state"]), items["data"]

    def wait(self) -> None:
        """Returns when the save in progress, if any, is on disk."""
        with _named_failure(self._checkpointer.directory):
            self._checkpointer.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Waits for the save in progress. Its failure is raised, unless something else already is."""
        if kind is None:
            with _named_failure(self._checkpointer.directory):
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
      UserError: there is no checkpoint, or not this one, or it cannot be read.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise UserError(f"{directory}: no checkpoints here; train first")
    with ocp.training.Checkpointer(directory) as checkpointer:
        steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
        if not steps:
            raise UserError(f"{directory}: no complete checkpoint here; train first")
        if step is not None and step not in steps:
            raise UserError(f"{directory}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
        step = steps[-1] if step is None else step
        items = _load(checkpointer, step, {"params": to_nested_dict(abstract)})
    return from_nested_dict(abstract, items["params"]), step


def _load(checkpointer: ocp.training.Checkpointer, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        items = dict(checkpointer.load_checkpointables(step, wanted))
        items["data"] = dict(checkpointer.checkpointables_metadata(step).custom_metadata)
        return items
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{checkpointer.directory / str(step)}: checkpoint cannot be read ({reason}); "
            f"remove this directory to go on from the checkpoint before it"
        ) from error


class _named_failure:  # noqa: N801 (a context manager reads as a verb)
    """Turns a failed write into one line that names the directory."""

    def __init__(self, directory: os.PathLike) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None or not isinstance(error, OSError | ValueError):
            return
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) or "No space left" in reason or "RESOURCE_EXHAUSTED" in reason:
            raise UserError(
                f"{self._directory}: checkpoint not written ({reason[:300]}); earlier checkpoints are kept, "
                f"free space and run the same command again"
            ) from error
