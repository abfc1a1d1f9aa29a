"""Saves three checkpoints again and again, killed at another change of the file system each time: test_killed_saves.

    python killed_saves.py DIRECTORY MOMENTS

Each start is a fork that works in DIRECTORY/<moment>. Its last moment is one more than there are: that one survives.
The numbers of the moments, MOMENTS of them spread over all, are printed.
"""

import os
import signal
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from retro_jax.config import CheckpointConfig
from retro_jax.training.checkpoint import Checkpoints
from retro_jax.training.health import healthy
from retro_jax.training.state import TrainState

STEPS = (1, 2, 3)
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def state_of(step: int) -> TrainState:
    """Another state for every step."""
    value = jnp.full((3, 4), step, jnp.float32)
    return TrainState(jnp.int32(step), {"a": {"b": value}}, {"mu": value + 0.5}, healthy())


def save_all(directory: Path) -> None:
    with Checkpoints(directory, CheckpointConfig(keep_last=1)) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step), {"examples_seen": 8 * step})


def in_a_fork(directory: Path, moment: int | None) -> int:
    """Saves, killed before change number `moment`; gives the number of changes that were begun."""
    seen = directory.with_suffix(".seen")
    if not os.fork():
        count = 0

        def note(event: str, arguments: tuple) -> None:
            nonlocal count
            written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if (event in CHANGES or written) and str(directory) in str(arguments[0]):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(note)
        save_all(directory)
        seen.write_text(str(count))
        os._exit(0)
    _, status = os.wait()
    assert (os.WTERMSIG(status) == signal.SIGKILL) if moment else status == 0, status
    return 0 if moment else int(seen.read_text())


def main() -> None:
    directory, moments = Path(sys.argv[1]), int(sys.argv[2])
    count = in_a_fork(directory / "all", None)
    chosen = sorted({int(moment) for moment in np.linspace(1, count, moments)})
    for moment in chosen:
        in_a_fork(directory / str(moment), moment)
    print(count, *chosen)


if __name__ == "__main__":
    main()
