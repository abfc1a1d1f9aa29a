"""A window of steps recorded by JAX's profiler, to be opened with TensorBoard or Perfetto.

Each process records into a folder of its own: JAX names the files by host and second, which several processes share.
"""

import contextlib
import os
import sys
from pathlib import Path

import jax

DIRECTORY = "profile"


class ProfileWindow:
    """Records a few steps into `<workdir>/profile/process-N`; a context manager around the whole loop."""

    def __init__(self, workdir: str | os.PathLike, window: tuple[int, int] | None, steps: range) -> None:
        """Nothing is recorded yet.

        Args:
          workdir: of the run.
          window: first step (counted from 1) and number of steps; None records nothing.
          steps: the steps that this start of the run does; those of the window outside it are left out.
        """
        self._directory = Path(workdir) / DIRECTORY / f"process-{jax.process_index()}"
        self._recording = False
        self._window = range(0)
        if window is not None:
            first, count = window
            self._window = range(max(first, steps.start), min(first + count, steps.stop))
            if not self._window:
                print(
                    f"nothing to profile: steps {first} to {first + count - 1} are none of those of this start, "
                    f"{steps.start} to {steps.stop - 1}",
                    file=sys.stderr,
                )

    def before(self, step: int) -> contextlib.AbstractContextManager:
        """To be called before a step is dispatched; what it returns goes around the dispatch."""
        if step not in self._window:
            return contextlib.nullcontext()
        if not self._recording:
            jax.profiler.start_trace(self._directory)
            self._recording = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, metrics: object) -> None:
        """To be called behind the dispatch; ends the recording when the window's last step is done."""
        if self._recording and step == self._window[-1]:
            jax.block_until_ready(metrics)
            self._stop()

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording:
            self._stop()

    def _stop(self) -> None:
        self._recording = False
        jax.profiler.stop_trace()
